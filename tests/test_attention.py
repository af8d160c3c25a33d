"""Every attention kernel that runs here against the softmax written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2

from microdit_jax.errors import UserError
from microdit_jax.models import attention


def qkv(t: int, l: int, dtype=jnp.float32):  # noqa: E741
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, t, 2, 16), (2, l, 2, 16), (2, l, 2, 16))
    return [
        jax.random.normal(k, s, jnp.float32).astype(dtype)
        for k, s in zip(keys, shapes, strict=True)
    ]


def written_out(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("nthc,nlhc->nhtl", q, k) / 4.0
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("nhtl,nlhc->nthc", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("t, l", [(16, 16), (16, 77), (5, 3)])
@pytest.mark.parametrize("implementation", ["xla", "looped"])
def test_exact_ones(t, l, implementation):  # noqa: E741
    args = qkv(t, l)
    attend = attention.IMPLEMENTATIONS[implementation]
    assert relative_l2(attend(*args), written_out(*args)) < 2e-6
    rounded = attend(*qkv(t, l, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert relative_l2(rounded.astype(jnp.float32), written_out(*args)) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("t, l", [(128, 128), (64, 77)])
def test_splash_in_the_interpreter(t, l):  # noqa: E741
    """The TPU kernel's padding and masking; only a TPU runs the kernel itself."""
    args = qkv(t, l)
    out = attention.splash(*args, interpret=True)
    assert relative_l2(out, written_out(*args)) < 2e-5


def test_cudnn_needs_a_16_bit_type():
    with pytest.raises(UserError, match="set dtype='bfloat16' or attention='xla'"):
        attention.cudnn(*qkv(4, 4))


def test_cudnn_pads_odd_captions(monkeypatch):
    seen = {}

    def record(q, k, v, *, key_value_seq_lengths, implementation):
        seen.update(length=k.shape[1], lengths=key_value_seq_lengths, name=implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    attention.cudnn(*qkv(4, 77, jnp.bfloat16))
    assert seen["length"] == 78 and seen["name"] == "cudnn"
    np.testing.assert_array_equal(seen["lengths"], [77, 77])
    attention.cudnn(*qkv(4, 64, jnp.bfloat16))
    assert seen["length"] == 64 and seen["lengths"] is None
