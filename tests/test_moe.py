"""Expert choice against plain loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2

from microdit_jax.errors import UserError
from microdit_jax.models import moe


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
