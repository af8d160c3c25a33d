"""All ways to compute one network agree: outputs and gradients, in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2, tiny_model

from microdit_jax.models import attention, matmuls
from microdit_jax.models.dit import DiT, abstract_params
from microdit_jax.xla.bench import workloads

CONFIG = tiny_model().config
TOLERANCE = 1e-5


def loss_and_gradients(config, params, data):
    def loss(params, x, y):
        noise = jnp.linspace(0, 1, 2 * config.num_tokens).reshape(2, -1) % 0.37
        out, _ = DiT(config).apply(
            {"params": params}, x, data["t"], y, mask_noise=noise, mask_ratio=0.5
        )
        return jnp.square(out - x).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(params, data["x"], data["y"])


@pytest.fixture(scope="module")
def plain():
    params = workloads.random_tree(abstract_params(CONFIG))
    params = jax.tree.map(lambda w: 5 * w if w.ndim > 1 else w, params)
    data = jax.tree.map(jnp.asarray, workloads.inputs(CONFIG, 2))
    return params, data, loss_and_gradients(CONFIG, params, data)


@pytest.mark.parametrize(
    "option",
    [{"moe_dispatch": "onehot"}, {"attention": "looped"}, {"remat": "block"}, {"remat": "dots"}],
    ids=str,
)
def test_outputs_and_gradients_agree(plain, option):
    params, data, expected = plain
    found = loss_and_gradients(dataclasses.replace(CONFIG, **option), params, data)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(expected), strict=True
    ):
        assert np.linalg.norm(b) > 0 and relative_l2(a, b) < TOLERANCE, path


def test_padded_captions_agree(plain, monkeypatch):
    """A kernel that takes keys in multiples gets zero rows that no query attends to."""
    params, data, expected = plain
    monkeypatch.setitem(attention.KEY_MULTIPLES, CONFIG.attention, 2 + data["y"].shape[1])
    found = loss_and_gradients(CONFIG, params, data)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_l2(a, b) < TOLERANCE


def test_looped_attention_in_parts(monkeypatch):
    """Heads are computed in several chunks when few scores may be computed at a time."""
    monkeypatch.setattr(attention, "LOOPED_SCORES", 100)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (
        jax.random.normal(key, (2, length, 3, 4))
        for key, length in zip(keys, (6, 7, 7, 6), strict=True)
    )

    def gradients(implementation):
        out, pull = jax.vjp(attention.IMPLEMENTATIONS[implementation], q, k, v)
        return out, *pull(g)

    assert "while" in jax.jit(lambda: gradients("looped")).lower().as_text()
    for a, b in zip(gradients("looped"), gradients("xla"), strict=True):
        assert relative_l2(a, b) < 2e-6


def test_splash_gradients():
    """The TPU kernel, forwards and backwards, in the interpreter."""
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (1, t, 1, 8)) for key, t in zip(keys, (5, 7, 7), strict=True))

    def gradients(attend):
        return jax.grad(lambda *qkv: jnp.square(attend(*qkv)).sum(), argnums=(0, 1, 2))(q, k, v)

    found = gradients(functools.partial(attention.splash, interpret=True))
    expected = gradients(attention.plain)
    for a, b in zip(found, expected, strict=True):
        assert relative_l2(a, b) < TOLERANCE


@pytest.mark.parametrize("platform, barriers", [("cpu", True), ("cuda", False), ("tpu", False)])
def test_only_cpus_get_barriers(platform, barriers):
    """The platform that a program is compiled for decides, not the machine that compiles it."""
    x, w = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))

    def loss(x, w):
        return matmuls.batched_matmul(x, w).sum() + matmuls.matmul(x, w[0]).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, w)
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == barriers
