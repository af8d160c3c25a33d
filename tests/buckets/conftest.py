"""Both stores, each with a server of its own, and the tiny demo's data."""

import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest
from support import stores
from support.train_command import ROOT, prepare_emoji

STEPS, EVERY = 30, 6


class Run(NamedTuple):
    """A run of the tiny demo on a disk that nothing disturbed.

    Attributes:
      every: steps between two checkpoints.
    """

    data: pathlib.Path
    workdir: pathlib.Path
    steps: int = STEPS
    every: int = EVERY

    def arguments(self, workdir: str | pathlib.Path) -> list[str]:
        """Returns the command of the same run in another workdir."""
        return ["train_main.py", f"--config=tests/support/tiny_config.py:{self.data}",
                f"--workdir={workdir}", f"--config.train.steps={self.steps}",
                f"--config.train.checkpoint_every={self.every}"]  # fmt: skip

    def start(self, workdir: str, *, stderr: int | None = None) -> subprocess.Popen:
        """Starts the same run in another workdir, with the environment of this process."""
        flag = "--xla_force_host_platform_device_count"
        more = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flag}=2"}
        return subprocess.Popen(
            [sys.executable, *self.arguments(workdir)], cwd=ROOT, text=True,
            env=os.environ | more, stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip


@pytest.fixture(scope="session", params=["gs", "s3"])
def store(request, tmp_path_factory):
    """A store's name and the environment that leads to its server."""
    folder = tmp_path_factory.mktemp("store")
    with stores.gcs(folder / "gcs") if request.param == "gs" else stores.s3() as environment:
        yield request.param, environment | {"XDG_CACHE_HOME": str(folder / "cache")}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prepare_emoji(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def unbroken(data, tmp_path_factory):
    """A run on a disk, done."""
    run = Run(data, tmp_path_factory.mktemp("unbroken") / "run")
    stores.command({}, *run.arguments(run.workdir))
    return run
