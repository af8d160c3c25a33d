"""Two processes with four devices each, as two hosts, against one process with eight."""

import re
import shutil

import numpy as np
import pytest
from support.checkpoints import assert_same, flip, largest, make_state, restore
from support.processes import finish, free_port, start
from support.train_command import Command, lines, prepare_emoji, state_of

from microdit_jax.checkpoints.restore import steps_on_disk

GLOO = re.compile(r"\[Gloo\]|peer ranks|^\d* ?$")
STEPS, STATE = (
    20,
    """
sys.path.insert(0, "tests")
from support.checkpoints import RunCheckpoints, abstract, make_state, mesh, split

def place(leaf):
    return split(leaf, mesh(2, 2, 2))

def global_state(step):
    def put(leaf):
        return jax.make_array_from_callback(leaf.shape, place(leaf), np.asarray(leaf).__getitem__)
    return jax.tree.map(put, make_state(step))

def right(state, step):
    whole = jax.jit(lambda s: s, out_shardings=jax.NamedSharding(mesh(2, 2, 2), jax.P()))(state)
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, make_state(step))))
""",
)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prepare_emoji(tmp_path_factory.mktemp("data"))


def both(program: str, *arguments) -> list[str]:
    """What two processes print that run the same program as one job."""
    join = "hosts.initialize(sys.argv[1], 2, int(sys.argv[2]), timeout_seconds=60.0)"
    address = f"localhost:{free_port()}"
    results = finish(
        [start(join + STATE + program, address, number, *arguments) for number in range(2)]
    )
    assert [status for status, _, _ in results] == [0, 0], results
    return [
        # Gloo's threads print too, sometimes into each other's lines.
        "\n".join(line for line in out.splitlines() if line and not GLOO.search(line))
        for _, out, _ in results
    ]


def test_checkpoints_of_two_processes(tmp_path):
    """Saved by two, damaged, restored by two and by one."""
    save = """
with RunCheckpoints(sys.argv[3]) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, global_state(step), {"step": step})
"""
    load = """
with RunCheckpoints(sys.argv[3]) as checkpoints:
    state, metadata = checkpoints.restore(abstract(make_state(0), place))
    print(metadata["step"], right(state, metadata["step"]), checkpoints.all_steps())
    checkpoints.save(metadata["step"] + 1, global_state(metadata["step"] + 1), {"step": 5})
"""
    both(save, tmp_path)
    assert steps_on_disk(tmp_path) == [2, 3]
    assert_same(restore(tmp_path)[0], make_state(3))
    flip(largest(tmp_path, 3))
    assert both(load, tmp_path) == ["2 True [2, 3]"] * 2
    assert steps_on_disk(tmp_path) == [2, 3]
    assert_same(restore(tmp_path)[0], make_state(3))
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    flip(largest(tmp_path, 3))
    told = both(
        """
try:
    RunCheckpoints(sys.argv[3]).restore(abstract(make_state(0), place))
except UserError as error:
    print(error)
""",
        tmp_path,
    )
    assert told[0] == told[1] and "found step 3 is damaged: state/" in told[0]


def test_a_write_that_fails_on_one_process_ends_both(tmp_path):
    """At once: Orbax itself waits half an hour for the part that does not come."""
    program = """
def main(arguments):
    import resource
    with hosts.job(arguments[0], 2, int(arguments[1]), timeout_seconds=60.0):
        exec(arguments[3], globals())  # opens devices
        with RunCheckpoints(arguments[2]) as checkpoints:
            checkpoints.save(1, global_state(1), {})
            checkpoints.wait()
            if arguments[1] == "1":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            checkpoints.save(2, global_state(2), {})
            time.sleep(300)
boundary.run_command("__main__")
"""
    address, state = f"localhost:{free_port()}", STATE.replace("mesh(2, 2, 2)", "mesh(1, 8, 1)")
    results = finish([start(program, address, n, tmp_path, state) for n in range(2)])
    for status, _, text in results:
        assert status == 2, results
        assert "error: process 1 (" in text and "): could not write checkpoint 2 in" in text
        assert ": the disk is full; free some space" in text and "Traceback" not in text
    assert steps_on_disk(tmp_path) == [1]


def test_towers_of_two_processes(files):
    """Converted by one of each cache, also where a host has its own; loaded by one while the other
    is elsewhere; and rows that hosts computed differently."""
    program = """
import os
from microdit_jax.assets.load import load_codec
from microdit_jax.machine.placement import fetch, put_rows
os.environ["XDG_CACHE_HOME"] = sys.argv[3] + sys.argv[4] * sys.argv[2].count("1")
codec = load_codec(sys.argv[5])
hosts.barrier("converted")
if sys.argv[2] == "0":
    load_codec(sys.argv[5])
images = codec.decode(np.zeros((1, 4, 4, 4), np.float32))
devices = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
rows = fetch(put_rows(np.full(8, 1 + int(sys.argv[2])), devices))
print(hosts.from_first("go on", lambda: "went on"), np.isfinite(images).all(), rows)
"""
    for suffix in ("", "_other"):
        told = both(program, files / f"cache{suffix}", suffix, files / "vae")
        assert [text.splitlines()[-1] for text in told] == ["went on True [1 1 1 1 2 2 2 2]"] * 2
        conversions = sum("converting" in text for text in told)
        assert conversions == (2 if suffix else 1)


# ------------------------------------------------------------------ the real command
def flags(data_axis: int, fsdp: int, expert: int) -> list[str]:
    mesh = {"data": data_axis, "fsdp": fsdp, "expert": expert}
    axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    return [*axes, f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=10"]


def assert_close_runs(found, expected):
    """Weights, average, each of the optimiser's moments, and losses: to 1e-6 of their size."""
    one, other = state_of(found, STEPS), state_of(expected, STEPS)
    assert one.keys() == other.keys()

    def part(state, words):
        leaves = [leaf.ravel() for path, leaf in sorted(state.items()) if words in path]
        return np.concatenate(leaves).astype(np.float64)

    for words in ("params/", "ema/", "averages/", "/mu/", "/nu/", "step", "count", "skipped"):
        size = np.linalg.norm(part(other, words))
        assert np.linalg.norm(part(one, words) - part(other, words)) <= 1e-6 * size, words
    one, other = (part(state_of(run, STEPS, "snapshots"), "") for run in (found, expected))
    assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(other)
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in (found, expected)]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.slow
def test_two_processes_equal_one(data, tmp_path):  # noqa: F811
    """And what they saved half-way goes on the same, by one process on another mesh."""
    join = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    # Both compile: with programs kept, process 0 alone would find its own, and be done so much
    # earlier on a busy machine that Gloo, which waits 30 s for the other, gives up.
    commands = [
        Command(
            data, tmp_path / "two", *flags(2, 2, 2), *join, f"--process_id={number}",
            devices=4, name=f"_{number}", JAX_ENABLE_COMPILATION_CACHE="false",
        )
        for number in range(2)
    ]  # fmt: skip
    for command in commands:
        assert command.finish() == 0, command.text()
    one = Command(data, tmp_path / "one", *flags(2, 2, 2), devices=8)
    assert one.finish() == 0, one.text()
    assert_close_runs(tmp_path / "two", tmp_path / "one")

    shutil.copytree(tmp_path / "two", tmp_path / "other mesh")
    shutil.rmtree(tmp_path / "other mesh" / "checkpoints" / str(STEPS))
    other = Command(data, tmp_path / "other mesh", *flags(8, 1, 1), devices=8)
    assert other.finish() == 0, other.text()
    assert "step 10 of 20" in other.text()
    assert_close_runs(tmp_path / "other mesh", tmp_path / "one")
