"""Gradients and updates against the recorded reference; the train step's own promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import load_golden, relative_l2, tiny_model

from microdit_jax import diffusion, optim, train_step
from microdit_jax.diffusion import EdmConfig

EDM = EdmConfig()


@functools.cache
def recorded_loss():
    """params -> (masked loss on the recorded batch, noise and mask; its gradient)."""
    golden = load_golden("dit_small")

    def loss(params):
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

    return jax.jit(jax.value_and_grad(loss))


def worst(found, expected) -> float:
    """Largest relative L2 over the leaves; leaves the reference has at 0 must be 0 here."""
    errors = jax.tree.map(
        lambda a, b: relative_l2(a, b) if np.any(b) else float(np.abs(a).max()), found, expected
    )
    return max(jax.tree.leaves(errors))


def test_gradients_equal_the_reference(golden_small):
    _, grads = recorded_loss()(golden_small.params)
    np.testing.assert_allclose(optax.tree.norm(grads), golden_small.arrays["grad_norm"], rtol=1e-4)
    assert worst(grads, golden_small.tree("grad/")) < 1e-4


def test_three_adamw_steps_equal_the_reference(golden_small):
    params = golden_small.params
    optimizer = optim.adamw(optim.learning_rate(2.4e-4), weight_decay=0.1, clip_norm=0.25)
    opt_state, losses = optimizer.init(params), []
    update = jax.jit(functools.partial(optim.apply_gradients, optimizer))
    for _ in range(3):
        loss, grads = recorded_loss()(params)
        params, opt_state = update(grads, opt_state, params)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, golden_small.arrays["train_losses"], rtol=1e-5)
    assert worst(params, golden_small.tree("after3steps/")) < 1e-4


@functools.cache
def tiny_step():
    """A state and a jitted step of the tiny model, with an average from the second step on."""
    schedule = optim.learning_rate(1e-3)
    optimizer = optim.adamw(schedule)
    step = train_step.make_train_step(
        tiny_model(),
        optimizer,
        schedule,
        edm=EDM,
        mask_ratio=0.75,
        seed=18,
        ema_smoothing=0.9,
        ema_start_step=1,
    )

    def init(key):
        return train_step.init_state(tiny_model(), optimizer, key, with_ema=True)

    return jax.jit(init)(jax.random.key(0)), jax.jit(step)


def tiny_batch():
    keys = jax.random.split(jax.random.key(1), 2)
    return {
        "latents": jnp.broadcast_to(jax.random.normal(keys[0], (4, 1, 1, 1)), (4, 8, 8, 4)),
        "caption_latents": jax.random.normal(keys[1], (4, 7, 24)),
        "keep_caption": jnp.array([1.0, 0.0, 1.0, 1.0]),
    }


def test_train_step_is_a_function_of_seed_and_step():
    state, step = tiny_step()
    one, metrics_one = step(state, tiny_batch())
    again, metrics_again = step(state, tiny_batch())
    assert metrics_one["loss"] == metrics_again["loss"]
    jax.tree.map(np.testing.assert_array_equal, one.params, again.params)
    _, metrics_two = step(state.replace(step=state.step + 1), tiny_batch())
    assert metrics_two["loss"] != metrics_one["loss"]


def test_training_learns_a_fixed_batch_and_ema_follows():
    state, step = tiny_step()
    losses = []
    for _ in range(60):
        before = state
        state, metrics = step(state, tiny_batch())
        losses.append(float(metrics["loss"]))
        if int(state.step) == 1:  # until start_step the average is a copy
            jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
        if int(state.step) == 2:
            expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, state.params)
            assert worst(state.ema, expected) < 1e-6
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_dropped_caption_is_the_zero_caption():
    state, _ = tiny_step()

    @jax.jit
    def loss(batch):
        key = jax.random.key(3)
        return train_step.batch_loss(
            tiny_model(), state.params, batch, key, edm=EDM, mask_ratio=0.0
        )[0]

    batch = tiny_batch()
    dropped = loss(batch | {"keep_caption": jnp.zeros(4)})
    zero = {"latents": batch["latents"], "caption_latents": 0 * batch["caption_latents"]}
    np.testing.assert_allclose(dropped, loss(zero), rtol=1e-6)
