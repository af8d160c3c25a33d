"""Layer norms whose backward passes read few bytes.

Autodiff of a norm keeps float32 arrays and moves them through several kernels. These keep at most
one array in the type that their input has in memory, and one or two numbers of each token. With the
normalised input y = (x - mean) r and the gradient g of y, the gradient of x is
r (g - mean(g) - y mean(g y)), with means over the last axis (Ba et al. 2016, arXiv 1607.06450): one
kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from microdit_jax.models.derivatives import as_kept, with_backward


def _statistics(x: Array, eps: float, dtype: Any) -> tuple[Array, Array]:
    """Returns the mean and r = (variance + eps)^-1/2 of each token, both (*b, 1) in float32.

    Args:
      dtype: type of the network's matmuls. Where it rounds far more than a variance computed from
        sums of x alone, those take one pass over memory; else the mean is subtracted first.
    """
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    if jnp.dtype(dtype) == jnp.float32:  # which is not equal to the name "float32"
        variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    else:
        variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
        variance = jnp.maximum(variance, 0)
    return mean, jax.lax.rsqrt(variance + eps)


def _normalised(x: Array, mean: Array, r: Array) -> Array:
    return (x.astype(jnp.float32) - mean) * r


def _input_gradient(y: Array, r: Array, g: Array) -> Array:
    along, projection = g.mean(axis=-1, keepdims=True), (g * y).mean(axis=-1, keepdims=True)
    return r * (g - along - y * projection)


def _in_memory(x: Array) -> Array:
    """Returns a rounded array as it is read from memory, and one in float32 as it is.

    The latter may be a sum that XLA computes on the way.
    """
    return x if x.dtype == jnp.float32 else as_kept(x)[0]


# ------------------------------------------------------------------ without parameters
def _plain_forward(x: Array, eps: float) -> tuple[Array, Any]:
    mean, r = _statistics(x, eps, jnp.float32)
    y = _normalised(x, mean, r).astype(x.dtype)
    # In 16 bits XLA makes one Triton kernel of the statistics, in this form, and the norm, which
    # reads x once, forward and again backward. To keep the statistics would take one more kernel.
    return y, (y, r) if x.dtype == jnp.float32 else x


def _plain_backward(eps: float, residuals: Any, g: Array) -> tuple[Array]:
    if g.dtype == jnp.float32:
        y, r = as_kept(*residuals)
    else:
        (x,) = as_kept(residuals)
        mean, r = _statistics(x, eps, jnp.float32)
        y = _normalised(x, mean, r)
    return (_input_gradient(y, r, _in_memory(g).astype(jnp.float32)).astype(g.dtype),)


@with_backward(_plain_forward, _plain_backward, static=(1,))
def normalise(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """Layer norm over the last axis without scale or bias, in float32; returns the input's type."""
    return _plain_forward(x, eps)[0]


# ------------------------------------------------------------------ of a residual stream
# Each returns the stream beside its norm. What is added to the stream takes the returned one, so
# that the gradients of both meet in the norm's backward pass, in one kernel.
def _stream_gradient(x: Array, y: Array, r: Array, dstream: Array, g: Array, dtype: str) -> Array:
    """Adds the gradient through the norm to the stream's own and rounds the sum to `dtype`."""
    dx = dstream.astype(jnp.float32) + _input_gradient(y, r, g)
    return _in_memory(dx.astype(dtype)).astype(x.dtype)


def _scaled_forward(x, scale, eps, dtype, gradient_dtype):
    mean, r = _statistics(x, eps, dtype)
    x = _in_memory(x)
    y = _normalised(x, mean, r)
    h = y if scale is None else y * jnp.broadcast_to(scale, y.shape)
    return (x, h.astype(dtype)), (x, mean, r, scale)


def _scaled_backward(eps, dtype, gradient_dtype, residuals, gradients):
    x, mean, r, scale = residuals
    dstream, g = gradients
    y, g = _normalised(x, mean, r), _in_memory(g).astype(jnp.float32)
    if scale is None:
        return _stream_gradient(x, y, r, dstream, g, gradient_dtype), None
    dscale = (g * y).sum(axis=tuple(range(g.ndim - 1)))  # (d,)
    g = g * jnp.broadcast_to(scale, g.shape)
    return _stream_gradient(x, y, r, dstream, g, gradient_dtype), dscale


@with_backward(_scaled_forward, _scaled_backward, static=(2, 3, 4))
def scaled_norm(
    x: Float[Array, "*b d"],
    scale: Float32[Array, " d"] | None,
    eps: float,
    dtype: str,
    gradient_dtype: str,
) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
    """Returns x, and its layer norm over the last axis with a scale, computed in float32.

    Args:
      scale: None for a norm without one.
      dtype: type of the norm, and of the network's matmuls.
      gradient_dtype: type that the gradient of x is rounded to on its way through memory.
    """
    return _scaled_forward(x, scale, eps, dtype, gradient_dtype)[0]


def _modulated_forward(x, weight, shift, scale, eps, dtype, gradient_dtype):
    mean, r = _statistics(x, eps, dtype)
    x = _in_memory(x)
    y = _normalised(x, mean, r)
    scaled = y * jnp.broadcast_to(weight, y.shape)
    h = (scaled * (1 + scale[:, None]) + shift[:, None]).astype(dtype)
    return (x, h), (x, mean, r, weight, scale)


def _modulated_backward(eps, dtype, gradient_dtype, residuals, gradients):
    x, mean, r, weight, scale = residuals
    dstream, g = gradients
    y, g = _normalised(x, mean, r), _in_memory(g).astype(jnp.float32)
    dy = g * (weight[None] * (1 + scale))[:, None]  # (n, t, d)
    dx = _stream_gradient(x, y, r, dstream, dy, gradient_dtype)
    dshift, projection = g.sum(axis=1), (g * y).sum(axis=1)  # each (n, d)
    dweight = ((1 + scale) * projection).sum(axis=0)  # (d,)
    return dx, dweight, dshift, weight[None] * projection


@with_backward(_modulated_forward, _modulated_backward, static=(4, 5, 6))
def modulated_norm(
    x: Float[Array, "n t d"],
    weight: Float32[Array, " d"],
    shift: Float32[Array, "n d"],
    scale: Float32[Array, "n d"],
    eps: float,
    dtype: str,
    gradient_dtype: str,
) -> tuple[Float[Array, "n t d"], Float[Array, "n t d"]]:
    """Returns x, and h = norm(x) weight (1 + scale) + shift, computed in float32.

    h is adaptive layer norm (DiT, arXiv 2212.09748, section 3.2). Arguments are as for
    `scaled_norm`.
    """
    return _modulated_forward(x, weight, shift, scale, eps, dtype, gradient_dtype)[0]
