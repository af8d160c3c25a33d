"""Averages that a run tracks, their snapshots, and averages of other lengths made from them."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2
from support.checkpoints import ONE, abstract, flip, make_state, mesh, split
from test_checkpoints_profiles import step_weights

from microdit_jax.checkpoints import profiles
from microdit_jax.checkpoints.profiles import Profile
from microdit_jax.checkpoints.run import RunCheckpoints
from microdit_jax.checkpoints.snapshots import Snapshots, load_average
from microdit_jax.errors import UserError
from microdit_jax.training import averages
from microdit_jax.training.step import TrainState
from microdit_jax.trees import flatten

START, EVERY, LAST = 40, 10, 85


@functools.cache
def walk() -> dict[str, np.ndarray]:
    """The weights after each step, by the step: two leaves, one stored alone and one packed."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (512, 520), "bias": (5,)}
    steps = {name: rng.normal(size=(LAST + 1, *shape)) for name, shape in shapes.items()}
    return {name: np.cumsum(s, 0, dtype=np.float64).astype(np.float32) for name, s in steps.items()}


def state_at(step: int, place) -> TrainState:
    leaves = {name: values[step] for name, values in walk().items()}
    params = {name: jax.device_put(value, place(value)) for name, value in leaves.items()}
    zero = jax.device_put(jnp.int32(step), place(np.int32(step)))
    return TrainState(zero, params, (), None, zero)


def by_hand(step: int, length: float) -> dict[str, np.ndarray]:
    weights = step_weights(step - START, profiles.exponent(length))
    return {n: np.tensordot(weights, v[START + 1 : step + 1], 1) for n, v in walk().items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of sharded weights with snapshots at 50, 60, 70, 80 and 85, and its last state."""
    workdir, on = tmp_path_factory.mktemp("run"), mesh(2, 2, 2)
    state = averages.begun(state_at(START, lambda leaf: split(leaf, on)))
    advance = jax.jit(averages.advance)
    with RunCheckpoints(workdir) as checkpoints:
        with Snapshots(workdir, checkpoints, state.averages, EVERY, START, LAST) as snapshots:
            for step in range(START + 1, LAST + 1):
                new = state_at(step, lambda leaf: split(leaf, on))
                tracked = advance(state.averages, new.params, new.step)
                state = new.replace(averages=tracked)
                if snapshots.due(step):
                    snapshots.save(step, tracked)
            checkpoints.save(LAST, state, {"step": LAST})
    return workdir, state


def weights_of(workdir, length, place=lambda leaf: ONE):
    target = abstract(state_at(0, lambda leaf: ONE).params, place)
    return load_average(workdir, target, length)


def test_without_averages_a_state_is_what_it_was():
    assert set(flatten(state_at(3, lambda leaf: ONE))) == {
        "step", "params/kernel", "params/bias", "skipped",
    }  # fmt: skip
    assert averages.advance(None, {}, jnp.int32(1)) is None


def test_tracked_averages_are_the_sums_written_out(run):
    _, state = run
    for length in profiles.LENGTHS:
        found = state.averages.trees[f"{length:g}"]
        for name, expected in by_hand(LAST, length).items():
            assert relative_l2(found[name], expected) < 1e-5
            placed = state.params[name].sharding
            assert found[name].sharding.is_equivalent_to(placed, expected.ndim)


def test_the_newest_step_counts_exactly_after_many():
    """In float32, 1 - (1 - 1/t)^(g + 1) itself is a percent off by then."""
    exponent = profiles.exponent(0.05)
    for t in (1, 2, 1000, 300_000, 3_000_000):
        expected = -np.expm1((exponent + 1) * np.log1p(-1 / np.float64(t))) if t > 1 else 1.0
        found = averages.share(jnp.float32(t), exponent)
        assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [0.05, 0.06, 0.1, 0.15])
def test_any_length_is_made_on_any_devices(run, length):
    """To 1e-5 of the same sum written out in float64; near the average itself."""
    workdir, _ = run
    steps = [50, 60, 70, 80, 85]
    made = [Profile(s - START, profiles.exponent(x)) for s in steps for x in profiles.LENGTHS]
    weights, _ = profiles.combination(made, Profile(LAST - START, profiles.exponent(length)))
    sums = [by_hand(s, x) for s in steps for x in profiles.LENGTHS]
    expected = {n: sum(w * s[n] for w, s in zip(weights, sums, strict=True)) for n in sums[0]}
    for place in (lambda leaf: ONE, lambda leaf: split(leaf, mesh(2, 2, 2))):
        found, step = weights_of(workdir, length, place)
        assert step == LAST
        for name, value in expected.items():
            assert relative_l2(found[name], value) < 1e-5
            assert found[name].sharding == place(value)
            assert relative_l2(value, by_hand(LAST, length)[name]) < 0.05


def test_a_run_that_resumes_takes_later_snapshots_again(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    with RunCheckpoints(workdir) as checkpoints:
        with Snapshots(workdir, checkpoints, run[1].averages, EVERY, 70, 200) as snapshots:
            left = sorted(int(path.name) for path in (workdir / "snapshots").iterdir())
            assert left == [50, 60, 70]
            snapshots.save(80, run[1].averages)
    assert (workdir / "snapshots" / "80" / "manifest.json").is_file()


def test_a_checkpoint_waits_for_the_snapshot_of_its_step(run, tmp_path, monkeypatch):
    order, wait = [], RunCheckpoints.wait

    def noted(store):
        begun = store._saving is not None
        wait(store)
        if begun:
            order.append(store.folder.name)

    monkeypatch.setattr(RunCheckpoints, "wait", noted)
    with RunCheckpoints(tmp_path) as checkpoints:
        with Snapshots(tmp_path, checkpoints, run[1].averages, EVERY, START, LAST) as snapshots:
            snapshots.save(50, run[1].averages)
            checkpoints.save(50, run[1], {"step": 50})
            assert order == ["snapshots"]


def test_the_last_snapshot_goes_when_training_goes_on(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    with RunCheckpoints(workdir) as checkpoints:
        with Snapshots(workdir, checkpoints, run[1].averages, EVERY, LAST, 90) as snapshots:
            assert [step for step in range(LAST + 1, 91) if snapshots.due(step)] == [90]
            snapshots.save(90, run[1].averages)
    left = sorted(int(path.name) for path in (workdir / "snapshots").iterdir())
    assert left == [50, 60, 70, 80, 90]


def test_the_room_that_snapshots_take_is_told(run, tmp_path, capsys):
    with RunCheckpoints(tmp_path) as checkpoints:
        Snapshots(tmp_path, checkpoints, run[1].averages, EVERY, START, LAST)
        Snapshots(tmp_path, checkpoints, None, 0, START, LAST)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "a snapshot each 10 steps, up to 5 of 0.00213 GB, 0.0106 GB in all" in told


def test_damaged_snapshots_are_left_out(run, tmp_path, capsys):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    for step in (50, 85):
        files = [path for path in (workdir / "snapshots" / str(step)).rglob("*") if path.is_file()]
        flip(max(files, key=lambda path: path.stat().st_size))
    found, step = weights_of(workdir, 0.1)
    assert step == 80 and relative_l2(found["bias"], by_hand(80, 0.1)["bias"]) < 1e-5
    assert "step 50 is damaged: state/" in capsys.readouterr().err


def test_lengths_that_cannot_be_made(run, tmp_path):
    workdir, _ = run
    with pytest.raises(UserError, match=r"from 0\.03\d? to 0\.\d+, which the 5 snapshots"):
        weights_of(workdir, 0.01)
    for length in (0.0, -0.1, 0.3, float("nan")):
        with pytest.raises(UserError, match="an ema_length above 0 and up to 0.2887"):
            weights_of(workdir, length)
    with pytest.raises(UserError, match="expected snapshots of averages in .*found none; train"):
        weights_of(tmp_path, 0.1)
    with pytest.raises(UserError, match="does not fit this config: expected 0.05/blocks_0"):
        load_average(workdir, abstract(make_state(0).params), 0.06)
