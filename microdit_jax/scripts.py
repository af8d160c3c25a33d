"""What pip installs as commands: microdit-train and microdit-sample.

Each is a top-level module run as a script, so that its --help and its errors are the same.
"""

import runpy


def train() -> None:
    """train_main.py."""
    runpy.run_module("train_main", run_name="__main__", alter_sys=True)


def sample() -> None:
    """sample_main.py."""
    runpy.run_module("sample_main", run_name="__main__", alter_sys=True)
