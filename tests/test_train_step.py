"""Gradients and updates against the recorded reference; the train step's own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_l2

from microdit_jax import diffusion, optim, train_step
from microdit_jax.diffusion import EdmConfig

EDM = EdmConfig()


def recorded_loss(golden, params):
    """The masked loss on the recorded batch, noise and mask."""

    def network(x, c_noise):
        return golden.model.apply(
            {"params": params},
            x,
            c_noise,
            golden["y"],
            mask_noise=golden["mask_noise"],
            mask_ratio=0.75,
        )

    sigma = diffusion.training_sigma(golden["sigma_normal"], EDM)
    return diffusion.edm_loss(network, golden["latents"], golden["noise"], sigma).mean()


def worst(found, expected) -> float:
    """Largest relative L2 over the leaves; leaves the reference has at 0 must be 0 here."""
    errors = jax.tree.map(
        lambda a, b: relative_l2(a, b) if np.any(b) else float(np.abs(a).max()), found, expected
    )
    return max(jax.tree.leaves(errors))


@pytest.mark.parametrize("remat", ["none", "block"])
def test_gradients_equal_the_reference(golden_small, remat):
    grads = jax.grad(lambda p: recorded_loss(golden_small, p))(golden_small.params)
    np.testing.assert_allclose(
        optax.global_norm(grads), golden_small.arrays["grad_norm"], rtol=1e-4
    )
    assert worst(grads, golden_small.tree("grad/")) < 1e-4


def test_three_adamw_steps_equal_the_reference(golden_small):
    params = golden_small.params
    optimizer = optim.adamw(optim.learning_rate(2.4e-4), weight_decay=0.1, clip_norm=0.25)
    opt_state, losses = optimizer.init(params), []
    step = jax.jit(jax.value_and_grad(lambda p: recorded_loss(golden_small, p)))
    for _ in range(3):
        loss, grads = step(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, golden_small.arrays["train_losses"], rtol=1e-5)
    assert worst(params, golden_small.tree("after3steps/")) < 1e-4


def make_step(golden, **changes):
    schedule = optim.learning_rate(1e-3)
    optimizer = optim.adamw(schedule)
    options = {"edm": EDM, "mask_ratio": 0.75, "seed": 18, "ema_smoothing": 0.9} | changes
    options.setdefault("ema_start_step", 1)
    state = train_step.init_state(golden.model, optimizer, jax.random.key(0), with_ema=True)
    return state, jax.jit(train_step.make_train_step(golden.model, optimizer, schedule, **options))


def batch_of(golden):
    return {
        "latents": golden["latents"],
        "caption_latents": golden["y"],
        "keep_caption": jnp.array([1.0, 0.0]),
    }


def test_train_step_is_a_function_of_seed_and_step(golden_small):
    state, step = make_step(golden_small)
    batch = batch_of(golden_small)
    one, metrics_one = step(state, batch)
    again, metrics_again = step(state, batch)
    assert metrics_one["loss"] == metrics_again["loss"]
    jax.tree.map(np.testing.assert_array_equal, one.params, again.params)
    _, metrics_two = step(state.replace(step=state.step + 1), batch)
    assert metrics_two["loss"] != metrics_one["loss"]


def test_training_learns_a_fixed_batch_and_ema_follows(golden_small):
    state, step = make_step(golden_small)
    losses = []
    for _ in range(30):
        before = state
        state, metrics = step(state, batch_of(golden_small))
        losses.append(float(metrics["loss"]))
        if int(state.step) == 1:  # until start_step the average is a copy
            jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
        if int(state.step) == 2:
            expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, state.params)
            assert worst(state.ema, expected) < 1e-6
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_dropped_caption_is_the_zero_caption(golden_small):
    args = {"edm": EDM, "mask_ratio": 0.0}
    key = jax.random.key(3)
    batch = batch_of(golden_small) | {"keep_caption": jnp.zeros(2)}
    dropped = train_step.batch_loss(golden_small.model, golden_small.params, batch, key, **args)
    batch = batch_of(golden_small) | {"caption_latents": jnp.zeros_like(golden_small["y"])}
    del batch["keep_caption"]
    zero = train_step.batch_loss(golden_small.model, golden_small.params, batch, key, **args)
    np.testing.assert_array_equal(dropped, zero)
