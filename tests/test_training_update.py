"""The wiring of a step around its gradients: seed, finiteness, clipping, logging, average.

The gradients are a small function here, so nothing but the wiring is compiled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_model
from support.one_of_each import mesh_of

from microdit_jax.diffusion import EdmConfig
from microdit_jax.training import gradients, optim
from microdit_jax.training import step as train_step
from microdit_jax.training.step import Gradients, TrainState

SCHEDULE = optim.learning_rate(1e-2, warmup_steps=10)
BATCH = {"latents": jnp.ones((4, 8, 8, 4))}


def step_with(
    monkeypatch, gradients, *, schedule=SCHEDULE, seed=3, clip_norm=0.25, ema_start_step=0
):
    """A train step whose gradients are `gradients(params, batch, key)`, and its first state."""
    monkeypatch.setattr(train_step, "make_gradients", lambda model, **options: gradients)
    optimizer = optim.adamw(schedule, clip_norm=clip_norm, eps=1.0)
    step = train_step.make_train_step(
        tiny_model(),
        optimizer,
        schedule,
        edm=EdmConfig(),
        mask_ratio=0.75,
        seed=seed,
        ema_smoothing=0.8,
        ema_start_step=ema_start_step,
    )
    state = TrainState.create({"w": jnp.ones((2, 2))}, optimizer, with_ema=True)
    return jax.jit(step), state


def plain(value, loss=1.0):
    """Gradients of one value everywhere, and a loss."""
    grads = {"w": jnp.full((2, 2), value, jnp.float32)}
    images = jnp.full((4,), loss, jnp.float32)
    return Gradients(grads, optax.tree.norm(grads), images, images)


@pytest.mark.parametrize(("value", "loss"), [(jnp.inf, 1.0), (jnp.nan, 1.0), (0.1, jnp.nan)])
def test_gradient_and_loss_must_both_be_finite(monkeypatch, value, loss):
    step, state = step_with(monkeypatch, lambda *_: plain(value, loss))
    after, metrics = step(state, BATCH)
    assert (metrics["skipped"], metrics["skipped_in_a_row"], after.step) == (1, 1, 1)
    for tree in (after.params, after.ema, after.opt_state[1][0].mu):
        assert np.isfinite(tree["w"]).all()
    np.testing.assert_array_equal(after.params["w"], state.params["w"])


def test_the_key_is_a_function_of_seed_and_step(monkeypatch):
    def gradients(params, batch, key):
        return plain(0.1, jax.random.uniform(key))

    losses = []
    for seed in (3, 4):
        step, state = step_with(monkeypatch, gradients, seed=seed)
        for expected_step in range(2):
            key = jax.random.fold_in(jax.random.key(seed), expected_step)
            state, metrics = step(state, BATCH)
            np.testing.assert_allclose(metrics["loss"], jax.random.uniform(key), rtol=1e-6)
            losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 4


def test_the_logged_learning_rate_is_the_one_that_was_used(monkeypatch):
    """Warm-up starts at 0: the first update moves nothing, and the log says so."""
    step, state = step_with(monkeypatch, lambda *_: plain(0.1))
    first, metrics = step(state, BATCH)
    assert metrics["learning_rate"] == 0
    np.testing.assert_array_equal(first.params["w"], state.params["w"])
    second, metrics = step(first, BATCH)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-3, rtol=1e-6)
    assert (second.params["w"] < first.params["w"]).all()


def test_the_learning_rate_is_computed_once(monkeypatch):
    """Not again in the kernel of each weight: a tenth of XL/2's instructions."""
    schedule = optim.learning_rate(1e-2, warmup_steps=1, decay_steps=9)
    step, state = step_with(monkeypatch, lambda *_: plain(0.1), schedule=schedule)
    assert step.lower(state, BATCH).compile().as_text().count(" cosine(") == 1


def test_the_average_follows_from_its_start_on(monkeypatch):
    step, state = step_with(monkeypatch, lambda *_: plain(0.1), ema_start_step=2)
    averages, weights = [], []
    for _ in range(4):
        state, _ = step(state, BATCH)
        averages.append(float(state.ema["w"][0, 0]))
        weights.append(float(state.params["w"][0, 0]))
    assert averages[:2] == weights[:2] and weights[1] < weights[0]
    np.testing.assert_allclose(averages[2], 0.8 * averages[1] + 0.2 * weights[2], rtol=1e-6)
    np.testing.assert_allclose(averages[3], 0.8 * averages[2] + 0.2 * weights[3], rtol=1e-6)


def test_gradients_are_clipped_by_the_norm_of_all(monkeypatch):
    """Logged is the norm before: 4 gradients of 1 have norm 2, and are scaled to norm 0.5."""
    step, state = step_with(monkeypatch, lambda *_: plain(1.0), clip_norm=0.5)
    after, metrics = step(state, BATCH)
    assert metrics["grad_norm"] == 2
    np.testing.assert_allclose(after.opt_state[1][0].mu["w"], 0.1 * 0.25, rtol=1e-6)


# ------------------------------------------------------------------------------ gradients
def linear_loss(model, params, batch, key, *, edm, mask_ratio):
    """A loss whose gradient by w is its image's first latent, by w1 the same for every expert."""
    first = batch["latents"][:, 0, 0, 0]
    loss = first * (params["w"].sum() + params["mlp"]["w1"].sum())
    return loss, batch["position"].astype(jnp.float32)


@pytest.mark.parametrize(
    "mesh_sizes, dtype",
    [
        (None, "float32"),
        ((8, 1, 1), "float32"),
        ((2, 4, 1), "float32"),
        ((2, 2, 2, 1), "float32"),
        ((2, 2, 2, 1), "bfloat16"),
    ],
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_are_of_the_mean_over_all_images(monkeypatch, mesh_sizes, dtype, micro_batches):
    monkeypatch.setattr(gradients, "batch_loss", linear_loss)
    mesh = None if mesh_sizes is None else mesh_of(mesh_sizes)
    make = gradients.make_gradients(
        tiny_model(),
        edm=EdmConfig(),
        mask_ratio=0.5,
        mesh=mesh,
        micro_batches=micro_batches,
        gradient_dtype=dtype,
        replicate_below=1,
    )
    params = {"w": jnp.ones((4, 8)), "mlp": {"w1": jnp.ones((2, 4, 8))}}
    latents = jnp.zeros((16, 8, 8, 4)).at[:, 0, 0, 0].set(jnp.arange(16.0))
    found = jax.jit(make)(params, {"latents": latents}, jax.random.key(0))
    for leaf in jax.tree.leaves(found.grads):
        np.testing.assert_allclose(leaf, 7.5, rtol=1e-6)
    np.testing.assert_allclose(found.norm, 7.5 * np.sqrt(32 + 64), rtol=1e-6)
    np.testing.assert_allclose(found.loss, np.arange(16) * 96, rtol=1e-6)
    # Global positions, whatever device and micro-batch an image is in
    np.testing.assert_array_equal(found.sigma, np.arange(16))


def test_held_out_noise_is_a_function_of_seed_and_draw(monkeypatch):
    def keyed_loss(model, params, batch, key, *, edm, mask_ratio):
        assert mask_ratio == 0
        value = jnp.full(4, jax.random.uniform(key))
        return value, value

    monkeypatch.setattr(train_step, "batch_loss", keyed_loss)
    found = set()
    for seed in (1, 2):
        step = train_step.make_eval_step(tiny_model(), edm=EdmConfig(), seed=seed)
        for draw in (0, 1):
            loss, _ = step({}, BATCH | {"draw": jnp.int32(draw)})
            found.add(float(loss[0]))
    assert len(found) == 4
