"""The learned uncertainty: what it learns, that shards make no difference, and where it is kept."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_l2
from support.one_of_each import CONFIG, EDM, mesh_of
from test_train import tiny_config
from test_training_step_mesh import OPTIMIZER, SCHEDULE, SHARD_ALL, make_batch, shaken

from microdit_jax import sharding
from microdit_jax import train as train_module
from microdit_jax.checkpoints.weights import load_weights
from microdit_jax.errors import UserError
from microdit_jax.machine.signals import Phase
from microdit_jax.models.dit import DiT, abstract_params
from microdit_jax.train import train
from microdit_jax.training import step as train_step
from microdit_jax.training import uncertainty
from microdit_jax.training.config import check, model_config
from microdit_jax.training.loss import batch_loss, with_position
from microdit_jax.training.metric_writer import read_metrics

SIGMA = np.exp(np.random.default_rng(0).normal(-0.6, 1.2, 512)).astype(np.float32)


# ------------------------------------------------------------------------------ what is learned
def test_it_learns_the_logarithm_of_the_loss():
    """Of a loss that depends on the noise level, and is random beside."""
    expected = 0.2 + 0.8 / (1 + SIGMA)
    random = np.random.default_rng(1)
    state, advance = uncertainty.begin(), jax.jit(uncertainty.advance)
    assert not np.any(uncertainty.log_loss(state.weights, jnp.asarray(SIGMA)))
    for step in range(600):
        loss = expected * random.uniform(0.5, 1.5, len(SIGMA))
        rate = jnp.float32(0.03 * (1 - step / 600))
        state = advance(state, jnp.float32(loss), jnp.asarray(SIGMA), rate=rate, finite=True)
    found = np.exp(uncertainty.log_loss(state.weights, jnp.asarray(SIGMA)))
    assert np.abs(found / expected - 1).mean() < 0.03


def test_the_first_step_by_hand():
    """At u = 0 the derivative of loss / exp(u) + u is 1 - loss; Adam's first step is its sign."""
    sigma, loss = jnp.ones(2), jnp.asarray([3.0, 2.0])
    options = {"rate": jnp.float32(0.1), "finite": jnp.asarray(True)}
    moved = uncertainty.advance(uncertainty.begin(), loss, sigma, **options)
    assert moved.weights["bias"] == pytest.approx(0.1, rel=1e-4)
    # ln 1 = 0: its cosines are 1, its sines 0
    np.testing.assert_allclose(moved.weights["kernel"], [0.1] * 16 + [0] * 16, rtol=1e-4)
    u = uncertainty.log_loss(moved.weights, sigma)
    np.testing.assert_allclose(u, [1.7, 1.7], rtol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing():
    start = uncertainty.begin()
    options = {"rate": jnp.float32(0.1), "finite": jnp.asarray(False)}
    kept = uncertainty.advance(start, jnp.asarray([jnp.nan]), jnp.ones(1), **options)
    jax.tree.map(np.testing.assert_array_equal, kept, start)


# ------------------------------------------------------------------------------ in a step
@functools.cache
def five_steps(sizes: tuple[int, ...] | None, micro_batches: int = 1, learned: bool = True):
    """The states before each step and after the last, and each step's metrics."""
    mesh = None if sizes is None else mesh_of(sizes)
    model, key = DiT(CONFIG), jax.random.key(0)
    if mesh is None:
        state, batch = train_step.init_state(model, OPTIMIZER, key, with_ema=True), make_batch()
    else:
        state = train_step.sharded_init(model, OPTIMIZER, key, mesh, with_ema=True, **SHARD_ALL)
        batch = sharding.put_batch(make_batch(), mesh)
    state = shaken(state)
    state = uncertainty.begun(state) if learned else state
    step = jax.jit(
        train_step.make_train_step(
            model, OPTIMIZER, SCHEDULE, edm=EDM, mask_ratio=0.75, seed=18, ema_smoothing=0.9,
            ema_start_step=2, mesh=mesh, micro_batches=micro_batches, **SHARD_ALL,
        )
    )  # fmt: skip
    states, metrics = [state], []
    for _ in range(5):
        state, found = step(state, batch)
        states.append(state)
        metrics.append(jax.device_get(found))
    return jax.device_get(states), metrics


@pytest.mark.parametrize("options", [((1, 2, 2, 2), 1), ((2, 2, 2), 2)], ids=str)
def test_shards_make_no_difference(options):
    expected_states, expected = five_steps(None)
    states, metrics = five_steps(*options)
    for name in ("loss", "grad_norm", "image_loss", "image_sigma"):
        np.testing.assert_allclose(
            [m[name] for m in metrics], [m[name] for m in expected], rtol=2e-5, err_msg=name
        )
    errors = jax.tree.map(
        lambda a, b: relative_l2(a, b) if np.any(b) else float(np.abs(a).max()),
        states[-1],
        expected_states[-1],
    )
    assert max(jax.tree.leaves(errors)) < 2e-5
    assert np.abs(states[-1].uncertainty.weights["kernel"]).max() > 1e-3  # has moved


def test_metrics_tell_the_plain_loss():
    """In the first step all is as without it; in the last the losses are those of the weights."""
    (_, plain_state, *_), plain = five_steps(None, learned=False)
    states, metrics = five_steps(None)
    jax.tree.map(np.testing.assert_array_equal, metrics[0], plain[0])
    jax.tree.map(np.testing.assert_array_equal, states[1].params, plain_state.params)
    key = jax.random.fold_in(jax.random.key(18), 4)
    batch = with_position({k: jnp.asarray(v) for k, v in make_batch().items()})
    before = jax.tree.map(jnp.asarray, states[4])
    loss, sigma = batch_loss(DiT(CONFIG), before.params, batch, key, edm=EDM, mask_ratio=0.75)
    np.testing.assert_allclose(metrics[4]["image_loss"], loss, rtol=1e-5)
    assert metrics[4]["loss"] == pytest.approx(float(loss.mean()), rel=1e-5)

    def objective(params):
        loss, _ = batch_loss(DiT(CONFIG), params, batch, key, edm=EDM, mask_ratio=0.75)
        return jnp.mean(loss * jnp.exp(-uncertainty.log_loss(before.uncertainty.weights, sigma)))

    norm = float(optax.tree.norm(jax.grad(objective)(before.params)))
    assert metrics[4]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics[4]["grad_norm"] != pytest.approx(plain[4]["grad_norm"], rel=1e-3)


def test_a_state_without_it_is_what_it_was():
    states, _ = five_steps(None, learned=False)
    assert states[-1].uncertainty is None
    assert len(jax.tree.leaves(five_steps(None)[0][-1])) == len(jax.tree.leaves(states[-1])) + 7


# ------------------------------------------------------------------------------ in a run
def uncertain(folder, learned: bool = True, **changes):
    config = tiny_config(folder, **changes)
    config.loss.learned_uncertainty = learned
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, train(uncertain(folder), folder / "whole")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_stopped_and_resumed_is_bit_equal(trained, monkeypatch):
    folder, state = trained
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(
            train_module.StopRequest,
            "agreed",
            lambda self: self.phase is Phase.TRAINING and next(asked) == 2,
        )
        assert int(train(uncertain(folder), folder / "resumed").step) == 2
    resumed = train(uncertain(folder), folder / "resumed")
    same(resumed, state)
    assert resumed.uncertainty.adam.count == 4
    dropped = ("speed", "module_grad_norm")
    lines = [
        [{k: v for k, v in line.items() if k not in dropped} for line in read_metrics(folder / run)]
        for run in ("resumed", "whole")
    ]
    assert [line for line in lines[0] if "loss" in line] == [
        line for line in lines[1] if "loss" in line
    ]


@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
def test_another_stage_goes_on_with_it_leaves_it_out_or_begins_it(
    trained, capsys, before, after
):  # fmt: skip
    folder, _ = trained
    source = "whole" if before else "plain"
    if not before:
        train(uncertain(folder, False), folder / source)
    config = uncertain(folder, after, steps=5)
    config.init_from = str(folder / source)
    state = train(config, folder / f"{before}_{after}")
    assert (state.uncertainty is not None) == after
    text = capsys.readouterr().out
    assert ("its learned uncertainty is left out" in text) == (before and not after)
    assert ("the learned uncertainty begins at 0" in text) == (after and not before)
    if after:
        assert state.uncertainty.adam.count == (5 if before else 1)


def test_the_same_workdir_asks_for_the_same(trained):
    folder, _ = trained
    with pytest.raises(UserError, match="does not fit this config"):
        train(uncertain(folder, False, steps=9), folder / "whole")


def test_sampling_does_not_know_of_it(trained):
    folder, state = trained
    shapes = abstract_params(model_config(uncertain(folder)))
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=state.step.sharding), shapes
    )
    same(load_weights(str(folder / "whole"), target)[0], state.ema)


@pytest.mark.parametrize("change", [{"teacher": "instant"}, {"lora.rank": 2}])
def test_what_it_does_not_go_with_is_refused(tmp_path, change):
    config = uncertain(tmp_path, mask_ratio=0.0)
    config.init_weights_from = "instant" if "lora.rank" in change else ""
    config.eval.evaluators = ()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match="found a teacher or lora.rank beside it; leave it False"):
        check(config)
