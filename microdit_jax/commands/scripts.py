"""The commands that pip installs, each a module or a file of this project run as a script.

So `microdit-evaluate --help` and `python -m microdit_jax.evaluate --help` are one and the same.
"""

import runpy
import sys

from microdit_jax.files import shipped


def _run_file(name: str) -> None:
    sys.argv[0] = str(shipped(name))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _run_module(name: str) -> None:
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def train() -> None:
    """microdit-train: train_main.py."""
    _run_file("train_main.py")


def sample() -> None:
    """microdit-sample: sample_main.py."""
    _run_file("sample_main.py")


def convert() -> None:
    """microdit-convert: python -m convert."""
    _run_module("microdit_jax.convert")


def prepare() -> None:
    """microdit-prepare: python -m microdit_jax.prepare."""
    _run_module("microdit_jax.prepare")


def evaluate() -> None:
    """microdit-evaluate: python -m microdit_jax.evaluate."""
    _run_module("microdit_jax.evaluate")


def aot() -> None:
    """microdit-aot: python -m microdit_jax.xla.aot."""
    _run_module("microdit_jax.xla.aot")


def bench() -> None:
    """microdit-bench: python -m microdit_jax.xla.bench."""
    _run_module("microdit_jax.xla.bench")


def app() -> None:
    """microdit-app: python -m microdit_jax.app."""
    _run_module("microdit_jax.app")


def report() -> None:
    """microdit-report: python -m microdit_jax.training.report."""
    _run_module("microdit_jax.training.report")
