"""Backward passes of our own against autodiff of the formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2

from microdit_jax.models import activations, layers, matmuls, norms

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
    "gelu": (activations.gelu_erf, lambda x: jax.nn.gelu(x, approximate=False), [(4, 16)]),
    "swiglu": (
        activations.swiglu,
        lambda x: x[:, :8] * jax.nn.sigmoid(x[:, :8]) * x[:, 8:],
        [(4, 16)],
    ),
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


def test_a_scale_that_the_matrix_takes():
    """Equals the norm with its scale, in outputs and gradients."""
    x, w, scale, *g = arrays((2, 5, 32), (32, 24), (32,), (2, 5, 32), (2, 5, 24))

    def found(dtype, method):
        precision = layers.Precision(dtype, "float32")
        norm = layers.LayerNorm(EPS, precision)
        linear = layers.SplitLinear(1, 24, precision, False, layers.xavier)

        def apply(x, w, scale):
            variables = {"params": {"scale": scale}}
            x, *rest = norm.apply(variables, x, gradient_dtype=dtype, method=method)
            return x, *linear.apply({"params": {"kernel": w}}, *rest)

        out, pull = jax.vjp(apply, x.astype(dtype), w, scale)
        return out, pull(tuple(a.astype(dtype) for a in g))

    wide, rounded = found("float32", "beside_stream"), found("bfloat16", "before_matrix")
    for a, b in zip(*map(jax.tree.leaves, (rounded, wide)), strict=True):
        assert relative_l2(np.float32(a), np.float32(b)) < 8e-3


def test_weights_in_float32_get_gradients_in_float32():
    """Sums of many products are not rounded to the type of the matmul's inputs."""
    x, w, g = arrays((3, 64, 16), (16, 8), (3, 64, 8))
    x, g = x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)
    wide_x, wide_g = x.astype(jnp.float32), g.astype(jnp.float32)
    cases = {
        "matmul": (matmuls.matmul, w, g, jnp.einsum("btd,btf->df", wide_x, wide_g)),
        "batched": (
            matmuls.batched_matmul,
            jnp.stack([w] * 3),
            g,
            jnp.einsum("btd,btf->bdf", wide_x, wide_g),
        ),
        "parts": (
            lambda x, w: jnp.concatenate(matmuls.matmul_parts(x, w, 2), axis=-1),
            w,
            g,
            jnp.einsum("btd,btf->df", wide_x, wide_g),
        ),
    }
    for name, (function, weight, g, expected) in cases.items():
        out, pull = jax.vjp(function, x, weight)
        dx, dw = pull(g)
        assert out.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32, name
        assert relative_l2(dw, expected) < 1e-6, name


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
