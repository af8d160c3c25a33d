"""The real command, killed and started again until it is done, against a run left in peace."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from microdit_jax.checkpoints import packing
from microdit_jax.checkpoints.restore import steps_on_disk
from microdit_jax.encoders import registry
from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.prepare.emoji_set import prepare_emoji_set
from microdit_jax.trees import flatten

ROOT = pathlib.Path(__file__).parent.parent
# By hand: KILLS=10 .venv/bin/python -m pytest -q tests/test_resume.py
CHECKPOINT_EVERY = 6
KILLS = int(os.environ.get("KILLS", "3"))
STEPS = 30 + 20 * KILLS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The embedded pictures, prepared once."""
    folder = tmp_path_factory.mktemp("data")
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

    def __init__(self, data, workdir, *flags: str, devices: int = 2, name: str = "", **more):
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
                    f"--config=tests/support/tiny_config.py:{data}",
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


def state_of(workdir, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, whatever devices wrote it."""
    handler, folder = ocp.PyTreeCheckpointHandler(), workdir / "checkpoints" / str(step) / "state"
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


def assert_equal_runs(found, expected):
    """Bit for bit: weights, optimiser, average, counters; and what was logged."""
    one, other = state_of(found, STEPS), state_of(expected, STEPS)
    assert one.keys() == other.keys()
    assert {path.split("/")[0] for path in one} >= {"params", "opt_state", "ema", "step"}
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype
        assert leaf.tobytes() == other[path].tobytes(), path
    assert lines(found) == lines(expected)


@pytest.fixture(scope="session")
def unbroken(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    command = Command(data, workdir)
    assert command.finish() == 0, command.text()
    assert [line["step"] for line in lines(workdir) if "loss" in line] == list(range(1, STEPS + 1))
    return workdir


def test_killed_at_random_moments(data, unbroken, tmp_path):
    """Every second kill hits a checkpoint that is being written."""
    workdir, rng = tmp_path / "run", random.Random(KILLS)
    seen = []
    for number in range(KILLS):
        command, before = Command(data, workdir), max(steps_on_disk(workdir), default=0)
        # At the second save from here on, the first is on disk.
        saving, ahead = number % 2 == 1, 2 * CHECKPOINT_EVERY
        step = rng.randint(1, ahead) if saving else rng.randint(ahead + 1, 3 * ahead // 2)
        command.wait_for_step(before + step, saving=saving)
        time.sleep(rng.random() * 0.05)
        command.process.send_signal(signal.SIGKILL)
        assert command.finish() == -signal.SIGKILL
        partial = [path.name for path in workdir.glob("checkpoints/*tmp*")]
        seen.append((last_step(workdir), steps_on_disk(workdir), partial))
    print(f"killed after these steps, with these checkpoints, and these half-written: {seen}")
    assert any(steps for _, steps, _ in seen) and any(partial for *_, partial in seen)
    command = Command(data, workdir)
    assert command.finish() == 0, command.text()
    assert "is damaged" not in command.text() and "resumed" in command.text()
    assert_equal_runs(workdir, unbroken)


def test_asked_to_stop(data, unbroken, tmp_path):
    workdir = tmp_path / "run"
    command = Command(data, workdir)
    command.wait_for_step(20)
    command.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert command.finish() == 0, command.text()
    assert time.monotonic() - began < 20
    stopped = last_step(workdir)
    assert 20 <= stopped < STEPS and max(steps_on_disk(workdir)) == stopped  # saved where it was
    assert "SIGTERM: saving and stopping" in command.text()
    command = Command(data, workdir)
    assert command.finish() == 0, command.text()
    assert_equal_runs(workdir, unbroken)


def test_damage_goes_back_one_checkpoint(data, unbroken, tmp_path):
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    older, newest = sorted(steps_on_disk(workdir))[-2:]
    path = max(workdir.glob(f"checkpoints/{newest}/**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    command = Command(data, workdir)
    assert command.finish() == 0, command.text()
    assert f"step {newest} is damaged" in command.text()
    assert f"using step {older}" in command.text()
    assert (workdir / "damaged" / str(newest)).is_dir()
    assert_equal_runs(workdir, unbroken)
