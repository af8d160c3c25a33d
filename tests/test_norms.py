"""Backward passes of our own against autodiff of the formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2

from microdit_jax.models import layers, norms

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
        lambda x, w: norms.scaled_norm(x, w, EPS, *["float32"] * 2),
        lambda x, w: (x, plain(x) * w[None, None]),
        [(2, 3, 16), (16,)],
    ),
    "modulated": (
        lambda x, w, b, s: norms.modulated_norm(x, w, b, s, EPS, *["float32"] * 2),
        lambda x, w, b, s: (x, plain(x) * w[None, None] * (1 + s[:, None]) + b[:, None]),
        [(2, 3, 16), (16,), (2, 16), (2, 16)],
    ),
    "gelu": (layers.gelu_erf, lambda x: jax.nn.gelu(x, approximate=False), [(4, 16)]),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case):
    ours, formula, shapes = CASES[case]
    inputs = arrays(*shapes)
    results = formula(*inputs)
    g = jax.tree.map(lambda result: arrays(result.shape)[0], results)  # of the stream too, if any
    found, expected = (jax.jit(lambda f=f: jax.vjp(f, *inputs)[1](g))() for f in (ours, formula))
    for a, b in zip(*map(jax.tree.leaves, (ours(*inputs), results)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and relative_l2(a, b) < 1e-5


@pytest.mark.parametrize("case", ["normalise", "scaled", "modulated"])
def test_float32_subtracts_the_mean_before_it_squares(case):
    """Sums of squares would cancel beside a large mean: with 1000 they leave 2 of 7 digits."""
    ours, formula, shapes = CASES[case]
    x, *others = arrays(*shapes)
    found, expected = (
        jax.tree.leaves(r)[-1] for r in (ours(x + 1000, *others), formula(x, *others))
    )
    assert relative_l2(found, expected) < 1e-3


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


def test_a_rounded_stream_is_what_its_norm_and_its_gradient_see():
    x, w, *gradients = arrays((4, 64), (64,), (4, 64), (4, 64))
    rounded = x.astype(jnp.bfloat16)
    types = "bfloat16", "bfloat16"
    (stream, h), pull = jax.vjp(lambda x, w: norms.scaled_norm(x, w, EPS, *types), rounded, w)
    gradients = tuple(g.astype(jnp.bfloat16) for g in gradients)
    dx, dw = pull(gradients)
    np.testing.assert_array_equal(stream, rounded)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    wide = rounded.astype(jnp.float32)
    formula = lambda x, w: (x, plain(x) * w[None])  # noqa: E731
    pull_wide = jax.vjp(formula, wide, w)[1]
    dx_wide, dw_wide = pull_wide(tuple(g.astype(jnp.float32) for g in gradients))
    assert relative_l2(dw, dw_wide) < 1e-5  # nothing but the inputs is rounded here
    assert relative_l2(h, formula(wide, w)[1]) < 4e-3 and relative_l2(dx, dx_wide) < 4e-3


def test_a_wide_streams_gradient_can_be_rounded():
    x, w, g = arrays((4, 8), (8,), (4, 8))
    pulls = [
        jax.vjp(lambda x, t=t: norms.scaled_norm(x, w, EPS, "float32", t), x)[1]
        for t in ("float32", "bfloat16")
    ]
    (wide,), (narrow,) = (pull((g, g)) for pull in pulls)
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16).astype(jnp.float32))
    assert narrow.dtype == jnp.float32 and not np.array_equal(narrow, wide)
