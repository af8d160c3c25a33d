"""Backward passes of our own against autodiff of the formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2

from microdit_jax.models import derivatives, layers, norms

EPS = 1e-6
RNG = np.random.default_rng(0)


def arrays(*shapes):
    return tuple(jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in shapes)


def plain(x, eps=EPS):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + eps)


CASES = {
    "normalise": (lambda x: norms.normalise(x, EPS), plain, [(2, 3, 16)]),
    "scaled": (
        lambda x, w: norms.scaled_norm(x, w, EPS, "float32", "float32"),
        lambda x, w: plain(x) * w[None, None],
        [(2, 3, 16), (16,)],
    ),
    "modulated": (
        lambda x, w, b, s: norms.modulated_norm(x, w, b, s, EPS, "float32", "float32"),
        lambda x, w, b, s: plain(x) * w[None, None] * (1 + s[:, None]) + b[:, None],
        [(2, 3, 16), (16,), (2, 16), (2, 16)],
    ),
    "gelu": (layers.gelu_erf, lambda x: jax.nn.gelu(x, approximate=False), [(4, 16)]),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case):
    ours, formula, shapes = CASES[case]
    inputs = arrays(*shapes)
    (g,) = arrays(inputs[0].shape)
    found, expected = (jax.jit(lambda f=f: jax.vjp(f, *inputs)[1](g))() for f in (ours, formula))
    np.testing.assert_allclose(ours(*inputs), formula(*inputs), atol=2e-6)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and relative_l2(a, b) < 1e-5


def test_16_bit_types_stay_near_and_are_kept():
    x, g = (a.astype(jnp.bfloat16) for a in arrays((8, 64), (8, 64)))
    y, pull = jax.vjp(lambda x: norms.normalise(x, EPS), x)
    (dx,) = pull(g)
    assert y.dtype == dx.dtype == jnp.bfloat16
    wide = tuple(a.astype(jnp.float32) for a in (x, g))
    expected = jax.vjp(plain, wide[0])[1](wide[1])[0]
    assert relative_l2(y, plain(wide[0])) < 5e-3 and relative_l2(dx, expected) < 8e-3
    # A large mean would cancel in sums of squares; the network's matmuls round by far more.
    shifted = (3 + x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert relative_l2(norms.normalise(shifted, EPS), plain(shifted.astype(jnp.float32))) < 5e-3


def test_a_narrow_gradient_is_rounded_once():
    (x, g) = arrays((4, 8), (4, 8))
    y, pull = jax.vjp(lambda x: derivatives.narrow_gradient(x, "bfloat16"), x)
    np.testing.assert_array_equal(y, x)
    (found,) = pull(g)
    np.testing.assert_array_equal(found, g.astype(jnp.bfloat16).astype(jnp.float32))
    assert found.dtype == jnp.float32
