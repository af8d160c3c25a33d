import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
from support.checkpoints import (
    ONE,
    abstract,
    assert_same,
    flip,
    largest,
    make_state,
    mesh,
    restore,
    save_steps,
    split,
)
from support.one_of_each import mesh_of

from microdit_jax import sharding
from microdit_jax.checkpoints.restore import steps_on_disk
from microdit_jax.checkpoints.run import (
    RunCheckpoints,
    guidance_scale_of,
    is_run,
    read_run_metadata,
    write_run_metadata,
)
from microdit_jax.errors import UserError


# ------------------------------------------------------------------ saved and restored
def test_round_trip(tmp_path):
    save_steps(tmp_path, 5, 10)
    state, metadata = restore(tmp_path)
    assert_same(state, make_state(10))
    assert metadata == {"step": 10, "seed": 18}
    state, metadata = restore(tmp_path, step=5)
    assert_same(state, make_state(5))
    assert metadata["step"] == 5
    with pytest.raises(UserError, match="checkpoint 7 in .*, found steps 5, 10; give one of these"):
        restore(tmp_path, step=7)


def test_a_state_without_an_average(tmp_path):
    state = make_state(3).replace(ema=None)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        assert_same(checkpoints.restore(abstract(state))[0], state)


def test_no_checkpoint(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None and checkpoints.all_steps() == []
    with pytest.raises(UserError, match="expected a checkpoint in .*, found none; train first"):
        restore(tmp_path)
    assert not list(tmp_path.iterdir())  # reading leaves nothing


def test_what_stays(tmp_path):
    save_steps(tmp_path, *range(1, 10), keep_last=2, keep_every=4)
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [4, 8, 9]
    save_steps(tmp_path / "other", *range(1, 6), keep_last=3)
    with RunCheckpoints(tmp_path / "other") as checkpoints:
        assert checkpoints.all_steps() == [3, 4, 5]
    with pytest.raises(UserError, match="keep_last must be at least 1"):
        RunCheckpoints(tmp_path, keep_last=0)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    bump = jax.jit(lambda s: jax.tree.map(lambda a: a + jnp.ones((), a.dtype), s), donate_argnums=0)
    state, expected = make_state(1), make_state(1)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        bump(state)
    assert_same(restore(tmp_path)[0], expected)


@pytest.mark.parametrize(
    "before, after", [((2, 2, 2), (8, 1, 1)), ((1, 8, 1), None), (None, (2, 2, 2))]
)
def test_another_mesh(tmp_path, before, after):
    def placed(shape):
        return (lambda leaf: ONE) if shape is None else (lambda leaf: split(leaf, mesh(*shape)))

    expected = make_state(4)
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, placed(before)(leaf)), expected)
    target = abstract(expected, placed(after))
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state, {})
        found, _ = checkpoints.restore(target)
    assert_same(found, expected)
    jax.tree.map(lambda leaf, want: leaf.sharding == want.sharding or pytest.fail(), found, target)


def test_weights_split_over_slices_too(tmp_path):
    """Bit-equal from a mesh whose fsdp crosses slices to one where it does not, and back."""
    expected, meshes = make_state(4), [mesh_of((1, 2, 2, 2)), mesh_of((2, 2, 2))]
    for folder, (before, after) in {"there": meshes, "back": meshes[::-1]}.items():
        state, target = (
            jax.tree.map(place, expected, sharding.shardings(expected, where, replicate_below=0))
            for place, where in (
                (jax.device_put, before),
                (lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), after),
            )
        )
        with RunCheckpoints(tmp_path / folder) as checkpoints:
            checkpoints.save(4, state, {})
            found, _ = checkpoints.restore(target)
        assert_same(found, expected)
        split_over = found.params["blocks_0"]["kernel"].sharding.spec
        assert split_over == jax.P(None, "fsdp" if folder == "there" else ("fsdp", "slices"))


def test_a_damaged_step_is_written_again(tmp_path, capfd):
    save_steps(tmp_path, 5, 10)
    flip(largest(tmp_path, 10))
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract(make_state(0)))
        assert checkpoints.all_steps() == [5, 10]  # reading changes nothing
        checkpoints.save(7, make_state(7), {"step": 7})
        checkpoints.save(10, make_state(10), {"step": 10})
    assert "moved checkpoint 10 to" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["10"]
    assert_same(restore(tmp_path)[0], make_state(10))
    assert steps_on_disk(tmp_path) == [7, 10]


def test_the_step_just_restored_is_left_alone(tmp_path):
    save_steps(tmp_path, 5)
    before = (tmp_path / "checkpoints" / "5" / "manifest.json").stat().st_mtime_ns
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract(make_state(0)))
        checkpoints.save(5, make_state(6), {})
    assert (tmp_path / "checkpoints" / "5" / "manifest.json").stat().st_mtime_ns == before


# ------------------------------------------------------------------ saves that fail
def test_what_a_killed_save_leaves_is_not_a_step(tmp_path):
    save_steps(tmp_path, 5)
    partial = tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp"
    (partial / "state").mkdir(parents=True)
    assert_same(restore(tmp_path)[0], make_state(5))
    assert partial.exists()  # another process may be writing it
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract(make_state(0)))
        checkpoints.save(10, make_state(10), {})
    assert_same(restore(tmp_path)[0], make_state(10))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "5"]


FULL_DISK = """
import resource, sys
sys.path.insert(0, {tests!r})
import pathlib
from support.checkpoints import *
from microdit_jax.errors import UserError
workdir = pathlib.Path(sys.argv[1])
save_steps(workdir, 5)
with RunCheckpoints(workdir) as checkpoints:
    checkpoints.restore(abstract(make_state(0)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    checkpoints.save(10, make_state(10), {{}})
    try:
        checkpoints.wait()
    except UserError as error:
        print("told:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""


def test_a_full_disk_while_writing(tmp_path):
    """No file may grow over 1000 bytes: every write fails as on a full disk or quota."""
    tests = os.path.dirname(__file__)
    program = FULL_DISK.format(tests=tests)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True, text=True, cwd=os.path.dirname(tests),
    )  # fmt: skip
    assert "told: could not write checkpoint 10 in" in done.stdout, done.stderr
    assert "the disk is full; free some space" in done.stdout
    assert "orbax/checkpoint" not in done.stderr, done.stderr  # its pages about the same
    # What a thread was writing meanwhile may be left, under a name that no reader takes.
    left = [name for name in os.listdir(tmp_path / "checkpoints") if "-tmp" not in name]
    assert left == ["5"]
    assert_same(restore(tmp_path)[0], make_state(5))


def test_a_full_disk_before_writing(tmp_path, monkeypatch):
    save_steps(tmp_path, 5)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract(make_state(0)))
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(UserError, match="found 0.00 GB free on its disk"):
            checkpoints.save(10, make_state(10), {})
    assert os.listdir(tmp_path / "checkpoints") == ["5"]


def test_a_failed_save_raises_at_the_next_call(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(5, "Input/output error")

    for call in ("check", "wait", "save", "close"):
        checkpoints = RunCheckpoints(tmp_path / call)
        monkeypatch.setattr("microdit_jax.checkpoints.step_folders.checksums", fail)
        checkpoints.save(1, make_state(1), {})
        checkpoints._saving[1].exception()  # until it has failed
        monkeypatch.undo()
        arguments = (2, make_state(2), {}) if call == "save" else ()
        with pytest.raises(UserError, match="could not write checkpoint 1 .*Input/output error"):
            getattr(checkpoints, call)(*arguments)
        assert os.listdir(tmp_path / call / "checkpoints") == []
        if call != "close":  # a fault of the moment need not end the run
            checkpoints.save(1, make_state(1), {})
            checkpoints.close()
            assert checkpoints.latest_step() == 1


def test_a_save_that_hangs(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(
        "microdit_jax.checkpoints.step_folders.checksums", lambda folder: release.wait() and {}
    )
    checkpoints = RunCheckpoints(tmp_path, timeout_seconds=1.0)
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(UserError, match="expected checkpoint 1 on disk within 1 s, found it unf"):
        checkpoints.wait()
    release.set()


def test_config_of_a_run(tmp_path):
    assert not is_run(tmp_path)
    with pytest.raises(UserError, match="expected the workdir of a training run"):
        read_run_metadata(tmp_path)
    write_run_metadata(tmp_path, {"has_ema": True})
    assert is_run(tmp_path)
    assert read_run_metadata(tmp_path)["has_ema"]
    assert json.loads((tmp_path / "config.json").read_text())["format"] == "microdit_jax.run"


def test_a_part_that_is_missing_is_noticed_before_the_commit(tmp_path, monkeypatch):
    """As of a process that wrote to a disk of its own: the step is no checkpoint."""
    monkeypatch.setattr("microdit_jax.checkpoints.run.writers_of", lambda arrays: {0, 1})
    with pytest.raises(UserError, match="part of each process in .*, found none of process 1"):
        with RunCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(1), {"step": 1})
    assert steps_on_disk(tmp_path) == []


def test_the_scale_that_a_run_samples_with():
    assert guidance_scale_of({"config": {"eval": {"guidance_scale": 3}}}) == 3.0
    for other in (None, [], {"guidance_scale": True}, {"guidance_scale": -1.0}, {"x": 1}):
        assert guidance_scale_of({"config": {"eval": other}}) is None
