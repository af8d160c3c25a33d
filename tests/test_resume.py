"""The real command, killed and started again until it is done, against a run left in peace."""

import random
import shutil
import signal
import time

import pytest
from support.train_command import (
    CHECKPOINT_EVERY,
    KILLS,
    STEPS,
    Command,
    last_step,
    lines,
    prepare_emoji,
    state_of,
)

from microdit_jax.checkpoints.restore import steps_on_disk
from microdit_jax.checkpoints.step_folders import steps_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prepare_emoji(tmp_path_factory.mktemp("data"))


def assert_equal_runs(found, expected):
    """Bit for bit: weights, optimiser, average, counters; and what was logged."""
    one, other = state_of(found, STEPS), state_of(expected, STEPS)
    assert one.keys() == other.keys()
    fields = {path.split("/")[0] for path in one}
    assert fields >= {"params", "opt_state", "ema", "step", "averages"}
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype
        assert leaf.tobytes() == other[path].tobytes(), path
    assert lines(found) == lines(expected)
    taken = steps_of(expected, "snapshots").steps()
    assert steps_of(found, "snapshots").steps() == taken and taken[-1] == STEPS
    assert not steps_of(found, "snapshots").fault(taken[0])
    one, other = (state_of(run, taken[0], "snapshots") for run in (found, expected))
    assert {path: leaf.tobytes() for path, leaf in one.items()} == {
        path: leaf.tobytes() for path, leaf in other.items()
    }


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
    assert command.finish() == 75, command.text()  # not done: a supervisor starts it again
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
