"""train_main.py as a process of its own on the tiny demo, and what a run leaves on disk."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from microdit_jax.checkpoints import packing
from microdit_jax.encoders import registry
from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.prepare.emoji_set import prepare_emoji_set
from microdit_jax.trees import flatten

ROOT = pathlib.Path(__file__).parent.parent.parent
# By hand: KILLS=10 .venv/bin/python -m pytest -q tests/test_resume.py
CHECKPOINT_EVERY = 6
KILLS = int(os.environ.get("KILLS", "3"))
STEPS = 30 + 20 * KILLS


def prepare_emoji(folder):
    """Prepares the embedded emoji images for the tiny demo."""
    prepare_emoji_set(
        folder,
        resolution=32,
        fit_codec=PatchPCA.fit,
        codec_settings={"patch": 4, "channels": 8},
        text_encoder=registry.text_encoder("table:width=256,tokens=16,seed=0"),
    )
    return folder


class Command:
    """train_main.py of one workdir, as a process with its own simulated devices."""

    def __init__(
        self, data, workdir, *flags: str, devices: int = 2, name: str = "", config: str = "", **more
    ):
        """Starts it on the tiny demo and its data, or on another config."""
        flag = "--xla_force_host_platform_device_count"
        environment = (
            os.environ
            | {
                "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(f"{flag}=8", f"{flag}={devices}"),
            }
            | more
        )
        self._began = time.time()
        self.workdir, self._output = workdir, pathlib.Path(f"{workdir}{name}.txt")
        with open(self._output, "a") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "train_main.py",
                    f"--config={config or f'tests/support/tiny_config.py:{data}'}",
                    f"--workdir={workdir}", f"--config.train.steps={STEPS}",
                    f"--config.train.checkpoint_every={CHECKPOINT_EVERY}", *flags,
                ],
                cwd=ROOT, env=environment, stdout=output, stderr=output,
            )  # fmt: skip

    def wait_for_step(self, step: int, *, saving: bool = False) -> None:
        """Until it has done this step; if `saving`, until it writes a checkpoint after that."""
        while self.process.poll() is None:
            if self._wrote("metrics.jsonl") and last_step(self.workdir) >= step:
                if not saving or self._wrote("checkpoints/*.orbax-checkpoint-tmp*"):
                    return
            time.sleep(0.002)
        pytest.fail(f"the run ended by itself:\n{self.text()}")

    def _wrote(self, pattern: str) -> bool:
        """Whether there is such a file since this process began, not left by one before."""
        with contextlib.suppress(FileNotFoundError):
            return any(p.stat().st_ctime > self._began for p in self.workdir.glob(pattern))
        return False

    def finish(self) -> int:
        try:
            return self.process.wait(timeout=480)
        finally:
            self.process.kill()

    def text(self) -> str:
        return self._output.read_text()


def lines(workdir) -> list[dict]:
    """metrics.jsonl but for what was measured with a clock, and for a line being written."""
    path = workdir / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in whole if line.endswith("\n")]
    return [{name: v for name, v in line.items() if name != "speed"} for line in found]


def last_step(workdir) -> int:
    return max((line["step"] for line in lines(workdir)), default=0)


def state_of(workdir, step: int, kind: str = "checkpoints") -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, whatever devices wrote it; or of a snapshot."""
    handler, folder = ocp.PyTreeCheckpointHandler(), workdir / kind / str(step) / "state"
    stored = handler.metadata(folder)
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored.tree)
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )
    with ocp.Checkpointer(handler) as checkpointer:
        arrays = flatten(checkpointer.restore(folder, args=args))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    index = packing.read_index(stored.custom_metadata)
    for path, packed in index.items():
        leaf = jax.ShapeDtypeStruct(packed.shape, packed.dtype, sharding=place)
        arrays[path] = np.asarray(packing.unpack(arrays[packing.row_of(path)], packed, leaf))
    for row in packing.rows_of(index):
        del arrays[row]
    return arrays
