"""Layer norms whose backward passes read few bytes.

Autodiff of a norm keeps float32 arrays and moves them through several kernels. These keep the
normalised input y = (x - mean) r, in the type of the network's matmuls, and one number r of each
token. With the gradient g of y, the gradient of x is r (g - mean(g) - y mean(g y)), with means over
the last axis (Ba et al. 2016, arXiv 1607.06450): one kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from microdit_jax.models.derivatives import as_kept, with_backward


def _normalise(x: Array, eps: float, dtype: Any) -> tuple[Array, Array]:
    """Returns the normalised input (*b, d) and r = (variance + eps)^-1/2 (*b, 1), in float32.

    Args:
      dtype: type of the network's matmuls. Where it rounds far more than a variance computed from
        sums of x alone, those take one pass over memory; else the mean is subtracted first.
    """
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    if dtype == jnp.float32:
        centred = x - mean
        r = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
        return centred * r, r
    variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
    r = jax.lax.rsqrt(jnp.maximum(variance, 0) + eps)
    return (x - mean) * r, r


def _input_gradient(y: Array, r: Array, g: Array) -> Array:
    along, projection = g.mean(axis=-1, keepdims=True), (g * y).mean(axis=-1, keepdims=True)
    return r * (g - along - y * projection)


def _as_read(g: Array) -> Array:
    """Returns a gradient in float32; one in float32 may be a sum that XLA computes on the way."""
    return g if g.dtype == jnp.float32 else as_kept(g)[0].astype(jnp.float32)


# ------------------------------------------------------------------ without parameters
def _plain_forward(x: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    y, r = _normalise(x, eps, x.dtype)
    y = y.astype(x.dtype)
    return y, (y, r)


def _plain_backward(eps: float, residuals: tuple[Array, Array], g: Array) -> tuple[Array]:
    y, r = as_kept(*residuals)
    dx = _input_gradient(y.astype(jnp.float32), r, _as_read(g))
    return (dx.astype(y.dtype),)


@with_backward(_plain_forward, _plain_backward, static=(1,))
def normalise(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """Layer norm over the last axis without scale or bias, in float32; returns the input's type."""
    return _plain_forward(x, eps)[0]


# ------------------------------------------------------------------ with a scale
def _scaled_forward(x, scale, eps, dtype, kept_dtype):
    y, r = _normalise(x, eps, kept_dtype)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(dtype), (y.astype(kept_dtype), r, scale)


def _scaled_backward(eps, dtype, kept_dtype, residuals, g):
    y, r = as_kept(*residuals[:2])
    y, g = y.astype(jnp.float32), _as_read(g)
    dscale = (g * y).sum(axis=tuple(range(g.ndim - 1)))  # (d,)
    return _input_gradient(y, r, g * jnp.broadcast_to(residuals[2], g.shape)), dscale


@with_backward(_scaled_forward, _scaled_backward, static=(2, 3, 4))
def scaled_norm(
    x: Float32[Array, "*b d"], scale: Float32[Array, " d"], eps: float, dtype: str, kept_dtype: str
) -> Float[Array, "*b d"]:
    """Layer norm over the last axis with a scale, in float32; returns `dtype`.

    Args:
      kept_dtype: type of the normalised input that is kept for the backward pass.
    """
    return _scaled_forward(x, scale, eps, dtype, kept_dtype)[0]


# ------------------------------------------------------------------ modulated
def _modulated_forward(x, weight, shift, scale, eps, dtype, kept_dtype):
    y, r = _normalise(x, eps, kept_dtype)
    scaled = y * jnp.broadcast_to(weight, y.shape)
    h = (scaled * (1 + scale[:, None]) + shift[:, None]).astype(dtype)
    return h, (y.astype(kept_dtype), r, weight, scale)


def _modulated_backward(eps, dtype, kept_dtype, residuals, g):
    y, r = as_kept(*residuals[:2])
    weight, scale = residuals[2:]
    y, g = y.astype(jnp.float32), _as_read(g)
    dx = _input_gradient(y, r, g * (weight[None] * (1 + scale))[:, None])
    dshift, projection = g.sum(axis=1), (g * y).sum(axis=1)  # each (n, d)
    dweight = ((1 + scale) * projection).sum(axis=0)  # (d,)
    return dx, dweight, dshift, weight[None] * projection


@with_backward(_modulated_forward, _modulated_backward, static=(4, 5, 6))
def modulated_norm(
    x: Float32[Array, "n t d"],
    weight: Float32[Array, " d"],
    shift: Float32[Array, "n d"],
    scale: Float32[Array, "n d"],
    eps: float,
    dtype: str,
    kept_dtype: str,
) -> Float[Array, "n t d"]:
    """norm(x) weight (1 + scale) + shift: adaptive layer norm (DiT, arXiv 2212.09748, section 3.2).

    Args:
      kept_dtype: type of the normalised input that is kept for the backward pass.
    """
    return _modulated_forward(x, weight, shift, scale, eps, dtype, kept_dtype)[0]
