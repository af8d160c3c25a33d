"""The commands that pip installs, each a module or a file of this project run as a script.

So `microdit-evaluate --help` and `python -m microdit_jax.evaluate --help` are one and the same.
"""

from microdit_jax.commands.boundary import run_command
from microdit_jax.files import shipped


def train() -> None:
    """microdit-train: train_main.py."""
    run_command(str(shipped("train_main.py")))


def sample() -> None:
    """microdit-sample: sample_main.py."""
    run_command(str(shipped("sample_main.py")))


def convert() -> None:
    """microdit-convert: python -m convert."""
    run_command("microdit_jax.convert.__main__")


def prepare() -> None:
    """microdit-prepare: python -m microdit_jax.prepare."""
    run_command("microdit_jax.prepare.__main__")


def evaluate() -> None:
    """microdit-evaluate: python -m microdit_jax.evaluate."""
    run_command("microdit_jax.evaluate.__main__")


def aot() -> None:
    """microdit-aot: python -m microdit_jax.xla.aot."""
    run_command("microdit_jax.xla.aot.__main__")


def bench() -> None:
    """microdit-bench: python -m microdit_jax.xla.bench."""
    run_command("microdit_jax.xla.bench.__main__")


def app() -> None:
    """microdit-app: python -m microdit_jax.app."""
    run_command("microdit_jax.app.__main__")


def report() -> None:
    """microdit-report: python -m microdit_jax.training.report."""
    run_command("microdit_jax.training.report")
