"""Weights gathered and gradients summed block by block, on a mesh whose fsdp crosses slices."""

import functools

import jax
import numpy as np
import pytest
from conftest import relative_l2
from support.one_of_each import CONFIG, EDM, mesh_of

from microdit_jax import sharding
from microdit_jax.models.dit import DiT, init_params
from microdit_jax.training import gradients, streaming


@functools.cache
def shaken_params():
    """Weights of which none is zero."""
    params = jax.device_get(jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0)))
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda w: w + 0.1 * rng.normal(size=w.shape).astype(w.dtype), params)


def gradients_on(sizes: tuple[int, ...] | None, dtype: str = "float32"):
    mesh = None if sizes is None else mesh_of(sizes)
    make = gradients.make_gradients(
        DiT(CONFIG), edm=EDM, mask_ratio=0.75, mesh=mesh, gradient_dtype=dtype, replicate_below=64
    )
    rng = np.random.default_rng(0)
    batch = {
        "latents": rng.normal(size=(16, 8, 8, 4)).astype(np.float32),
        "caption_latents": rng.normal(size=(16, 7, 24)).astype(np.float32),
        "keep_caption": np.ones(16, np.float32),
    }
    if mesh is not None:
        batch = sharding.put_batch(batch, mesh)
    return jax.device_get(jax.jit(make)(shaken_params(), batch, jax.random.key(1)))


one_device = functools.cache(functools.partial(gradients_on, None))


@pytest.mark.parametrize(
    "sizes, ahead, dtype, bound",
    [
        ((1, 2, 2, 1), 4, "float32", 1e-5),  # every modulation's matrix is gathered
        ((1, 2, 2, 2), 1, "float32", 1e-5),  # but the first block's, rows travel
        ((2, 2, 2, 1), 2, "bfloat16", 6e-3),
    ],
    ids=str,
)
def test_gradients_equal_one_device(monkeypatch, sizes, ahead, dtype, bound):
    monkeypatch.setattr(streaming, "AHEAD", ahead)
    of_rows, real = [], streaming._modulation

    def seen(rows, columns):
        of_rows.append((rows.shape, columns["kernel"].shape))
        return real(rows, columns)

    monkeypatch.setattr(streaming, "_modulation", seen)
    expected, found = one_device(), gradients_on(sizes, dtype)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    errors = jax.tree.map(relative_l2, found.grads, expected.grads)
    worst = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda item: item[1])
    assert worst[1] < bound, worst
    # All rows of a copy of the weights, and a device's columns: of a mixer's block and backbone's
    rows = 16 // sizes[0] // sizes[3]
    assert {shapes[0] for shapes in of_rows} <= {(rows, 32)}
    assert len({shapes[1] for shapes in of_rows}) == (0 if ahead == 4 else 1)
