"""Networks, losses and schedules on trial: what they compute, and that their operations count."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.one_of_each import CONFIG, EDM

from benchmarks import trials
from benchmarks.race_count import compiled_flops
from benchmarks.race_runs import operations
from configs import demo
from microdit_jax.models import dit
from microdit_jax.training import loss as training_loss

BATCH = {
    "latents": jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 4)), jnp.float32),
    "caption_latents": jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 24)), jnp.float32),
    "position": jnp.arange(3, dtype=jnp.int32),
}


def randomised(network) -> Any:
    """Weights of a network, none of them zero."""
    x, y = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 1, 24))
    init = jax.eval_shape(network(CONFIG).init, jax.random.key(0), x, jnp.zeros(1), y)
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * random.normal(size=leaf.shape), jnp.float32), init["params"]
    )


def loss_of(network, params, mask_ratio=0.0, loss=training_loss.batch_loss, **more):
    key = jax.random.key(3)

    @jax.jit
    def run(params):
        batch = BATCH | more
        return loss(network(CONFIG), params, batch, key, edm=EDM, mask_ratio=mask_ratio)[0]

    return run(params)


def test_values_that_are_not_mixed_change_nothing():
    params = randomised(trials.ValueResidual)
    mixed = loss_of(trials.ValueResidual, params)
    none = params | {"value_mix": jnp.zeros_like(params["value_mix"])}
    np.testing.assert_array_equal(loss_of(trials.ValueResidual, none), loss_of(dit.DiT, params))
    # Of CONFIG's blocks, mixer 1 and backbone 2, the last one has another to mix with.
    assert np.abs(mixed - loss_of(dit.DiT, params)).max() > 1e-4


def test_routed_patches_have_a_loss():
    params = randomised(trials.Rejoined)
    np.testing.assert_array_equal(loss_of(trials.Rejoined, params), loss_of(dit.DiT, params))
    masked, recipe = (loss_of(n, params, 0.75) for n in (trials.Rejoined, dit.DiT))
    assert np.abs(masked - recipe).max() > 1e-3
    fused = randomised(trials.Fused)
    grads = jax.grad(lambda p: loss_of(trials.Fused, p, 0.75).sum())(fused)
    for name in ("mask_token", "fusion"):
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[name]))


def test_uncertainty_divides_the_loss():
    params = randomised(trials.Uncertain)
    kept = {"keep_caption": jnp.ones(3, jnp.float32)}
    plain = loss_of(trials.Uncertain, params, loss=trials.uncertain_loss)
    np.testing.assert_array_equal(plain, loss_of(dit.DiT, params))
    head = {"uncertainty": {"kernel": jnp.zeros((32, 1)), "bias": jnp.full((1,), np.log(2.0))}}
    found = loss_of(trials.Uncertain, params | head, loss=trials.uncertain_loss, **kept)
    np.testing.assert_allclose(found, plain / 2 + np.log(2), rtol=1e-6)


def test_the_stable_rate_falls_in_the_last_fifth():
    rate = trials.stable_then_linear(1.0, warmup_steps=10, decay_steps=100, final_ratio=0.05)
    found = [float(rate(step)) for step in (0, 5, 10, 80, 90, 100)]
    np.testing.assert_allclose(found, (0, 0.5, 1, 1, 0.525, 0.05), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused", "routed"])
def test_operations_are_those_of_the_program(name):
    config = demo.get_config("pretrain")
    config.model.options.update(
        depth=2, qkv_multipliers=(1.0, 1.0), ffn_multipliers=(1.0, 2.0), patch_mixer_depth=1
    )
    config.train.batch_size = 2
    expected, _ = operations(config, name)
    assert compiled_flops(config, name) == pytest.approx(expected, rel=0.05)
