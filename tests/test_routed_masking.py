"""Masking whose last blocks see all patches: what they see, what it costs, on a mesh as on one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2
from support.one_of_each import CONFIG, EDM, mesh_of
from test_training_step_mesh import OPTIMIZER, SCHEDULE, SHARD_ALL, make_batch, shaken

from microdit_jax import sharding
from microdit_jax.checkpoints.run import RunCheckpoints
from microdit_jax.errors import UserError
from microdit_jax.models import flops, masking
from microdit_jax.models.dit import DiT, abstract_params
from microdit_jax.training import step as train_step
from microdit_jax.trees import flatten

ROUTED = dataclasses.replace(CONFIG, unmasked_blocks=1)


def test_routed_tokens_by_hand():
    noise = jnp.array([[0.9, 0.1, 0.5, 0.3]], jnp.float32)
    mask = masking.make_mask(noise, 0.5)  # keeps 1, then 3
    routed = jnp.arange(8, dtype=jnp.float32).reshape(1, 4, 2)
    x = jnp.array([[[10.0, 20.0], [30.0, 40.0]]])
    found = masking.rejoin_tokens(x, mask, routed)
    np.testing.assert_array_equal(found[0], [[0, 1], [10, 20], [4, 5], [30, 40]])


def test_weights_are_those_of_the_paper_s_masking():
    plain, routed = (abstract_params(cfg) for cfg in (CONFIG, ROUTED))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), plain) == jax.tree.map(
        lambda a: (a.shape, a.dtype), routed
    )


@pytest.mark.parametrize("count", [-1, CONFIG.depth])
def test_a_block_is_left_that_the_mask_acts_on(count):
    with pytest.raises(UserError, match="unmasked_blocks from 0 to below depth"):
        dataclasses.replace(CONFIG, unmasked_blocks=count)


def test_all_patches_are_predicted_and_counted():
    """XLA counts as many more operations as models/flops.py does, but for elementwise ones."""
    n, l = 2, 5  # noqa: E741
    x, y = jnp.zeros((n, 8, 8, 4)), jnp.zeros((n, l, CONFIG.caption_channels))
    u = jnp.zeros((n, CONFIG.num_tokens))

    def counted(cfg):
        def forward(params):
            model = DiT(cfg)
            return model.apply({"params": params}, x, x[:, 0, 0, 0], y, mask_noise=u, mask_ratio=r)

        lowered = jax.jit(forward).lower(abstract_params(cfg))
        sample, mask = lowered.out_info
        assert sample.shape == x.shape and (mask is None) == bool(cfg.unmasked_blocks or r == 0)
        cost: Any = lowered.cost_analysis()
        return cost["flops"] / n

    for r in (0.75, 0.0):
        more = flops.forward_flops(ROUTED, r, l) - flops.forward_flops(CONFIG, r, l)
        # of elementwise ones 30 % more at the most, at this size
        assert more <= counted(ROUTED) - counted(CONFIG) <= 1.3 * more
        assert flops.recomputed_share(dataclasses.replace(ROUTED, remat="block"), r, l) < 1


@pytest.mark.slow
def test_neither_shards_nor_a_resume_make_a_difference(tmp_path):
    def steps(mesh):
        init = functools.partial(train_step.init_state, DiT(ROUTED), OPTIMIZER, with_ema=True)
        state, batch = jax.jit(init)(jax.random.key(0)), make_batch()
        if mesh is not None:
            state = jax.device_put(
                state, sharding.shardings(state, mesh, replicate_below=SHARD_ALL["replicate_below"])
            )
            batch = sharding.put_batch(batch, mesh)
        step = train_step.make_train_step(
            DiT(ROUTED), OPTIMIZER, SCHEDULE, edm=EDM, mask_ratio=0.75, seed=18, ema_smoothing=0.9,
            ema_start_step=2, mesh=mesh, replicate_below=SHARD_ALL["replicate_below"],
        )  # fmt: skip
        return shaken(state), batch, jax.jit(step)

    states = []
    for mesh in (None, mesh_of((2, 2, 2))):
        first, batch, step = steps(mesh)
        state = first
        for _ in range(3):
            state, _ = step(state, batch)
        states.append(jax.device_get((first.params, state.params)))
    begun, expected = map(flatten, states[0])
    for path, found in flatten(states[1][1]).items():
        assert relative_l2(expected[path], begun[path]) > 1e-4, path  # has moved
        assert relative_l2(found - begun[path], expected[path] - begun[path]) < 1e-3, path
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )
        resumed, _ = checkpoints.restore(target)
    jax.tree.map(np.testing.assert_array_equal, step(resumed, batch)[0], step(state, batch)[0])
