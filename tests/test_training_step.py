"""Gradients and updates against the recorded reference; the train step's own promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import load_golden, relative_l2, tiny_model

from microdit_jax import diffusion
from microdit_jax.diffusion import EdmConfig
from microdit_jax.models import dit
from microdit_jax.training import optim
from microdit_jax.training import step as train_step
from microdit_jax.training.loss import batch_loss, with_position

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
        return diffusion.edm_loss(
            network,
            golden["latents"],
            golden["noise"],
            sigma,
            sigma_data=EDM.sigma_data,
            patch_size=golden.config.patch_size,
        ).mean()

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
        module_grad_norms=True,
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
        return batch_loss(tiny_model(), state.params, batch, key, edm=EDM, mask_ratio=0.0)[0]

    batch = with_position(tiny_batch())
    dropped = loss(batch | {"keep_caption": jnp.zeros(4)})
    zero = batch | {"caption_latents": 0 * batch["caption_latents"], "keep_caption": jnp.ones(4)}
    np.testing.assert_allclose(dropped, loss(zero), rtol=1e-6)


def test_an_update_that_is_not_finite_is_skipped():
    """Weights, moments and average stay; the step and the learning rate's clock move on."""
    state, step = tiny_step()
    state, metrics = step(state, tiny_batch())
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (0, 0)
    poisoned = tiny_batch()
    poisoned["latents"] = poisoned["latents"].at[2, 3, 3, 0].set(jnp.nan)
    after = state
    for in_a_row in (1, 2):
        after, metrics = step(after, poisoned)
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, in_a_row)
        np.testing.assert_array_equal(np.isfinite(metrics["image_loss"]), [1, 1, 0, 1])
        assert np.isfinite(metrics["image_sigma"]).all()
    assert after.step == state.step + 2 == 3
    jax.tree.map(
        np.testing.assert_array_equal, (after.params, after.ema), (state.params, state.ema)
    )
    adam, _, clock = state.opt_state[1]
    adam_after, _, clock_after = after.opt_state[1]
    jax.tree.map(np.testing.assert_array_equal, adam_after, adam)
    assert clock_after.count == clock.count + 2 == after.step
    healed, metrics = step(after, tiny_batch())
    assert (metrics["skipped"], metrics["skipped_in_a_row"], healed.skipped) == (0, 0, 0)
    assert np.isfinite(metrics["loss"]) and worst(healed.params, state.params) > 0


def test_gradient_norms_by_module_add_up():
    state, step = tiny_step()
    _, metrics = step(state, tiny_batch())
    norms = metrics["module_grad_norm"]
    assert set(norms) == set(state.params)
    total = np.sqrt(sum(float(norm) ** 2 for norm in norms.values()))
    np.testing.assert_allclose(total, metrics["grad_norm"], rtol=1e-6)


def test_noise_belongs_to_the_image_not_to_its_row():
    """An image's loss depends on its position in the global batch, wherever a device puts it."""
    state, _ = tiny_step()

    @jax.jit
    def losses(batch):
        key = jax.random.key(3)
        return jnp.stack(
            batch_loss(tiny_model(), state.params, batch, key, edm=EDM, mask_ratio=0.5)
        )

    batch, order = with_position(tiny_batch()), jnp.array([2, 0, 3, 1])
    shuffled = {name: value[order] for name, value in batch.items()}
    np.testing.assert_allclose(losses(shuffled), losses(batch)[:, order], rtol=1e-6)


def test_casting_matrices_ahead_changes_no_bit():
    """In bfloat16 the network itself casts the same weights, and no others."""
    cfg = dataclasses.replace(tiny_model().config, dtype="bfloat16")
    model, batch = dit.DiT(cfg), with_position(tiny_batch())
    params = jax.tree.map(  # no weight at zero, where nothing after it would count
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape),
        tiny_step()[0].params,
    )

    @jax.jit
    def loss(params):
        key = jax.random.key(3)
        return batch_loss(model, params, batch, key, edm=EDM, mask_ratio=0.5)[0]

    cast = dit.cast_matrices(params, cfg)
    np.testing.assert_array_equal(loss(cast), loss(params))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(cast)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    # The experts and every projection travel in two bytes.
    block = cast["patch_mixer_1"]
    assert block["mlp"]["w1"].dtype == block["attn"]["qkv"]["kernel"].dtype == jnp.bfloat16
