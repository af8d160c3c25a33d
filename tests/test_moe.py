"""Expert choice against plain loops."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2

from microdit_jax import sharding
from microdit_jax.errors import UserError
from microdit_jax.models import matmuls, moe
from microdit_jax.models.layers import Precision


def loops(x, logits, w1, w2, k):
    """Each expert of each image in turn, in float64."""
    x, logits, w1, w2 = (np.asarray(a, np.float64) for a in (x, logits, w1, w2))
    erf = np.vectorize(math.erf)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = np.zeros_like(x)
    for image in range(x.shape[0]):
        for expert in range(w1.shape[0]):
            for token in np.argsort(-probabilities[image, :, expert])[:k]:
                hidden = x[image, token] @ w1[expert]
                hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
                out[image, token] += probabilities[image, token, expert] * hidden @ w2[expert]
    return out


@pytest.mark.parametrize("dispatch", [moe.dispatch_gather, moe.dispatch_onehot])
def test_dispatch_equals_loops(dispatch):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((3, 12, 8), (3, 12, 4), (4, 8, 16), (4, 16, 8))
    x, logits, w1, w2 = (
        jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True)
    )
    weight, index = moe.choose_tokens(logits, 6)
    assert weight.shape == index.shape == (3, 4, 6)
    out = jax.jit(dispatch)(x, weight, index, w1, w2)
    assert relative_l2(out, loops(x, logits, w1, w2, 6)) < 2e-6


def test_experts_without_a_token_are_told():
    assert moe.slots_of(2.0, 7, 8) == 1
    with pytest.raises(UserError, match="found 8 for 3 tokens at expert_capacity 2; give fewer"):
        moe.check_slots(2.0, 3, 8)


def test_routing_is_recorded(golden_small):
    _, state = golden_small.model.apply(
        {"params": golden_small.params},
        golden_small["x"],
        golden_small["t"],
        golden_small["y"],
        mutable=["intermediates"],
    )
    (routing,) = state["intermediates"]["blocks_1"]["mlp"]["routing"]
    assert routing.shape == (2, 4, 8)  # n, e, k = int(2.0 * 16 / 4)
    assert all(len(set(np.asarray(row))) == 8 for row in routing.reshape(-1, 8))


def layer(dtype: str, capacity: float):
    return moe.ExpertChoiceFeedForward(
        num_experts=2,
        capacity=capacity,
        hidden=2,
        init_std=0.02,
        out_init=nn.initializers.ones,
        dispatch="gather",
        precision=Precision(dtype, "float32"),
    )


def test_the_gate_is_float32_whatever_the_type():
    """Logits that differ by 1e-3 are equal in bfloat16; then the first token would be taken."""
    tokens = 2 + 1e-3 * jnp.arange(4.0)
    x = jnp.stack([tokens, jnp.zeros(4)], axis=1)[None]  # (1, t, d)
    params = {
        "w1": jnp.ones((2, 2, 2)),
        "w2": jnp.ones((2, 2, 2)),
        "gate": {"kernel": jnp.array([[1.0, -1.0], [0.0, 0.0]])},
    }
    out, state = layer("bfloat16", 0.5).apply({"params": params}, x, mutable=["intermediates"])
    (routing,) = state["intermediates"]["routing"]
    np.testing.assert_array_equal(routing, [[[3], [0]]])
    assert out.dtype == jnp.bfloat16


def test_the_gate_of_rounded_tokens_rounds_neither_its_weights_nor_its_logits():
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (2, 6, 32)).astype(jnp.bfloat16)
    w, g = jax.random.normal(keys[1], (32, 4)), jax.random.normal(keys[2], (2, 6, 4))
    found, pull = jax.vjp(jax.jit(moe.gate_logits), x, w)
    expected, pull_wide = jax.vjp(jnp.matmul, x.astype(jnp.float32), w)
    assert found.dtype == jnp.float32 and relative_l2(found, expected) < 2e-5
    for a, b, dtype in zip(pull(g), pull_wide(g), (jnp.bfloat16, jnp.float32), strict=True):
        assert a.dtype == dtype and relative_l2(a, b) < 5e-3


def test_a_tokens_slots():
    index = jnp.array([[[2, 0], [2, 3]]])  # (n, e, k): expert 0 takes tokens 2 and 0
    np.testing.assert_array_equal(
        moe.token_slots(index, 5), [[[1, -1, 0, -1, -1], [-1, -1, 0, 1, -1]]]
    )


@pytest.mark.parametrize("dispatch", list(moe.DISPATCHES.values()))
def test_the_gate_learns_by_the_weights_of_the_chosen(dispatch):
    """The gradient by a choice's weight is the sum of its expert's output."""
    keys = jax.random.split(jax.random.key(1), 4)
    x, w1 = jax.random.normal(keys[0], (2, 6, 4)), jax.random.normal(keys[1], (3, 4, 5))
    w2, logits = jax.random.normal(keys[2], (3, 5, 4)), jax.random.normal(keys[3], (2, 6, 3))
    weight, index = moe.choose_tokens(logits, 2)
    found = jax.grad(lambda weight: dispatch(x, weight, index, w1, w2).sum())(weight)
    for n, e, k in np.ndindex(2, 3, 2):
        token = np.asarray(x[n, index[n, e, k]], np.float64)
        hidden = token @ np.asarray(w1[e], np.float64)
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2)))
        expected = (hidden @ np.asarray(w2[e], np.float64)).sum()
        np.testing.assert_allclose(found[n, e, k], expected, rtol=1e-4, atol=1e-5)


def test_tables_of_names_and_functions():
    assert tuple(moe.DISPATCHES) == ("gather", "onehot")
    assert moe.slots_of(2.0, 15, 8) == 3  # 3.75
    weights = {p for p in jax.eval_shape(layer("float32", 1.0).init, jax.random.key(0),
                                         jnp.zeros((1, 4, 2)))["params"]}  # fmt: skip
    assert weights == {*sharding.EXPERT_WEIGHTS, "gate"}


def test_16_bits_gather_what_float32_scatters():
    """Two ways to the same sums and gradients: by each token's slots, and by adding rows."""
    keys = jax.random.split(jax.random.key(3), 3)
    weight, index = moe.choose_tokens(jax.random.normal(keys[0], (3, 12, 4)), 5)
    out = jax.random.normal(keys[1], (4, 3, 5, 8), jnp.bfloat16)
    x = jax.random.normal(keys[2], (3, 12, 8), jnp.bfloat16)

    def ways(dtype):
        there, back = jax.vjp(lambda x: moe.to_experts(x, index, 12), x.astype(dtype))
        total, gradient = jax.vjp(
            lambda out, weight: moe.to_tokens(out, weight, index, 12), out.astype(dtype), weight
        )
        return there, back(out.astype(dtype))[0], total, *gradient(x.astype(dtype))

    for found, expected in zip(ways(jnp.bfloat16), ways(jnp.float32), strict=True):
        assert relative_l2(np.float32(found), np.float32(expected)) < 4e-3


def test_float32_keeps_its_bits():
    """Products are rounded before they are added, and one matmul has all columns."""
    keys = jax.random.split(jax.random.key(4), 3)
    weight, index = moe.choose_tokens(jax.random.normal(keys[0], (2, 64, 4)), 32)
    out = jax.random.normal(keys[1], (4, 2, 32, 128))
    expected = np.zeros((2, 64, 128), np.float32)
    for image in range(2):
        for expert in range(4):
            rows = np.asarray(out[expert, image]) * np.asarray(weight[image, expert])[:, None]
            expected[image, np.asarray(index[image, expert])] += rows
    # As commands compile it: the tests' own level fuses no product with a sum.
    lowered = jax.jit(moe.to_tokens, static_argnums=3).lower(out, weight, index, 64)
    found = lowered.compile({"xla_backend_optimization_level": "3"})(out, weight, index)
    np.testing.assert_array_equal(found, expected)
    x, w = jax.random.normal(keys[0], (2, 8, 128)), jax.random.normal(keys[2], (128, 384))
    parts = jax.jit(matmuls.matmul_parts, static_argnums=2)(x, w, 3)
    whole = jax.jit(matmuls.matmul)(x, w)
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), whole)
