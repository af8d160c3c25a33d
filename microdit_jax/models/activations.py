"""The network's nonlinearities, those of branches with backward passes that keep little."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from microdit_jax.models.derivatives import as_kept, with_backward


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh form of GELU: every GELU of the network but the experts'."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    if x.dtype != jnp.float32:  # jax.nn's erfc keeps the small tail that 1 + erf rounds away
        return jax.nn.gelu(x, approximate=False), x
    return 0.5 * x * (1 + jax.lax.erf(x * np.float32(math.sqrt(0.5)))), x


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    (kept,) = as_kept(x)
    wide = kept.astype(jnp.float32)
    below = 0.5 * jax.lax.erfc(-wide * np.float32(math.sqrt(0.5)))  # the normal distribution's
    density = jnp.exp(-0.5 * jnp.square(wide)) * np.float32(1 / math.sqrt(2 * math.pi))
    return ((g.astype(jnp.float32) * (below + wide * density)).astype(x.dtype),)


@with_backward(_gelu_forward, _gelu_backward)
def gelu_erf(x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """The exact GELU, x (1 + erf(x / sqrt 2)) / 2: the experts'. It keeps its input alone."""
    return _gelu_forward(x)[0]


def _halves(x: Array) -> tuple[Array, Array]:
    gate, value = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return gate, value


def _swiglu_forward(x: Array) -> tuple[Array, Array]:
    gate, value = _halves(x)
    return (nn.silu(gate) * value).astype(x.dtype), x


def _swiglu_backward(x: Array, g: Array) -> tuple[Array]:
    gate, value = _halves(*as_kept(x))
    g, share = g.astype(jnp.float32), jax.nn.sigmoid(gate)
    dgate = g * value * share * (1 + gate * (1 - share))
    return (jnp.concatenate([dgate, g * gate * share], axis=-1).astype(x.dtype),)


@with_backward(_swiglu_forward, _swiglu_backward)
def swiglu(x: Float[Array, "*b f_both"]) -> Float[Array, "*b f"]:
    """silu(gate) * value of the two halves of x, computed in float32. It keeps its input alone."""
    return _swiglu_forward(x)[0]
