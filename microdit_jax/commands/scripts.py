"""The commands that pip installs, each a module or a file of this project run as a script.

So `microdit-evaluate --help` and `python -m microdit_jax.evaluate --help` are one and the same.
"""

from microdit_jax.commands.boundary import run_command
from microdit_jax.files import shipped

SCRIPTS = {
    "train": "train_main.py", "sample": "sample_main.py",
    "convert": "microdit_jax.convert.__main__", "prepare": "microdit_jax.prepare.__main__",
    "evaluate": "microdit_jax.evaluate.__main__", "aot": "microdit_jax.xla.aot.__main__",
    "bench": "microdit_jax.xla.bench.__main__", "app": "microdit_jax.app.__main__",
    "publish": "microdit_jax.assets.publish", "report": "microdit_jax.training.report",
}  # fmt: skip


def _run(name: str) -> None:
    script = SCRIPTS[name]
    run_command(str(shipped(script)) if script.endswith(".py") else script)


def train() -> None:
    """microdit-train: train_main.py."""
    _run("train")


def sample() -> None:
    """microdit-sample: sample_main.py."""
    _run("sample")


def convert() -> None:
    """microdit-convert: python -m convert."""
    _run("convert")


def publish() -> None:
    """microdit-publish: python -m microdit_jax.assets.publish."""
    _run("publish")


def prepare() -> None:
    """microdit-prepare: python -m microdit_jax.prepare."""
    _run("prepare")


def evaluate() -> None:
    """microdit-evaluate: python -m microdit_jax.evaluate."""
    _run("evaluate")


def aot() -> None:
    """microdit-aot: python -m microdit_jax.xla.aot."""
    _run("aot")


def bench() -> None:
    """microdit-bench: python -m microdit_jax.xla.bench."""
    _run("bench")


def app() -> None:
    """microdit-app: python -m microdit_jax.app."""
    _run("app")


def report() -> None:
    """microdit-report: python -m microdit_jax.training.report."""
    _run("report")
