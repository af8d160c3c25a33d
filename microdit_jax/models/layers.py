"""Building blocks without attention: linear layers, norms, embeddings, dense feed-forwards."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32

from microdit_jax.models import products

Dtype = Any
Initializer = Callable[..., Array]

# The reference draws these from a normal cut at +-2 *absolute*, 100 standard deviations out:
# the cut never acts, so this is the plain normal.
small_normal = nn.initializers.normal
xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return multiple * math.ceil(value / multiple)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh form of GELU: every GELU of the network but the experts'."""
    return jax.nn.gelu(x, approximate=True)


def gelu_erf(x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """The exact GELU, x (1 + erf(x / sqrt 2)) / 2: the experts'."""
    if x.dtype != jnp.float32:  # there, 1 + erf would lose what is small
        return jax.nn.gelu(x, approximate=False)
    return 0.5 * x * (1 + jax.lax.erf(x * np.float32(math.sqrt(0.5))))


def modulate(
    x: Float[Array, "n t d"], shift: Float[Array, "n d"], scale: Float[Array, "n d"]
) -> Float[Array, "n t d"]:
    """x (1 + scale) + shift: adaptive layer norm (DiT, Peebles & Xie 2022, section 3.2)."""
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


# The reference's default initialisation: Xavier-uniform kernel (in, out), zero bias.
Linear = functools.partial(nn.Dense, kernel_init=xavier, dot_general=products.dot_general)


def normalise(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """Layer norm over the last axis without scale or bias, in and to float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, in and to float32, with a scale but never a bias."""

    eps: float
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = normalise(x, self.eps)
        return y * jnp.broadcast_to(scale.astype(jnp.float32), y.shape)


class PatchEmbed(nn.Module):
    """Linear map of flattened p x p patches: the reference's strided convolution.

    The kernel's input axis runs over (channel, row, column), as the convolution's weight does.
    """

    dim: int
    patch_size: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n height width channels"]) -> Float[Array, "n t d"]:
        p = self.patch_size
        bound = 1 / math.sqrt(p * p * x.shape[-1])
        # (n, height, width, channels) -> (n, t, channels * p * p)
        patches = rearrange(x, "n (h p) (w q) c -> n (h w) (c p q)", p=p, q=p)
        return Linear(
            self.dim,
            bias_init=lambda key, shape, dtype: jax.random.uniform(
                key, shape, dtype, -bound, bound
            ),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="proj",
        )(patches)


def unpatchify(
    x: Float[Array, "n t f"], patch_size: int
) -> Float[Array, "n height width channels"]:
    """Puts side x side tokens back into a square; a token holds (row, column, channel)."""
    side = math.isqrt(x.shape[1])
    p = patch_size
    return rearrange(x, "n (h w) (p q c) -> n (h p) (w q) c", h=side, w=side, p=p, q=p)


def sincos_pos_embed(
    dim: int, grid: int, pos_interp_scale: float = 1.0
) -> Float32[np.ndarray, "t d"]:
    """Fixed 2-D sin-cos position embedding (MAE, He et al. 2021), computed in float64.

    Args:
      dim: width d, a multiple of 4.
      grid: tokens along one side; coordinates are arange(grid) / pos_interp_scale.
      pos_interp_scale: 1 at 256 px, 2 at 512 px, so that both share one coordinate range.
    Returns:
      (grid * grid, dim) float32; the first d/2 channels encode the column, the others the row, each
      as [sin, cos] of d/4 frequencies 10000^(-i / (d/4)).
    """
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    # float32 here, as the reference has it: it matters for scales that are not a power of two.
    position = np.arange(grid, dtype=np.float32) / np.float32(pos_interp_scale)
    angles = np.outer(position.astype(np.float64), omega)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, dim / 2)
    column = np.broadcast_to(axis[None, :, :], (grid, grid, dim // 2))
    row = np.broadcast_to(axis[:, None, :], (grid, grid, dim // 2))
    return np.concatenate([column, row], axis=-1).reshape(grid * grid, dim).astype(np.float32)


def timestep_embedding(
    t: Float[Array, " n"], dim: int = 512, max_period: float = 10000.0
) -> Float[Array, "n dim"]:
    """[cos, sin] features of t at dim/2 frequencies max_period^(-i / (dim/2)), in float32."""
    half = dim // 2
    steps = jnp.arange(half, dtype=jnp.float32)
    frequencies = jnp.exp(-math.log(max_period) * steps / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """c_noise (n,) -> (n, d): sin-cos features, then a two-layer MLP."""

    dim: int
    init_std: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, t: Float[Array, " n"]) -> Float[Array, "n d"]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = small_normal(self.init_std)
        x = timestep_embedding(t).astype(self.dtype)
        x = gelu_tanh(Linear(self.dim, kernel_init=init, name="mlp_0", **kinds)(x))
        return Linear(self.dim, kernel_init=init, name="mlp_2", **kinds)(x)


class Mlp(nn.Module):
    """fc1 -> GELU(tanh) -> layer norm -> fc2, for caption embeddings and their mean."""

    dim: int
    eps: float
    init_std: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b f"]) -> Float[Array, "*b d"]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = small_normal(self.init_std)
        x = gelu_tanh(Linear(self.dim, kernel_init=init, name="fc1", **kinds)(x))
        x = LayerNorm(self.eps, self.param_dtype, name="norm")(x)
        return Linear(self.dim, kernel_init=init, name="fc2", **kinds)(x)


class CaptionProjection(nn.Module):
    """Caption embeddings (n, l, caption_channels) -> (n, l, d)."""

    dim: int
    eps: float
    init_std: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, y: Float[Array, "n l f"]) -> Float[Array, "n l d"]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Mlp(self.dim, self.eps, self.init_std, name="y_proj", **kinds)(y)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w3(silu(w1 x) * w2 x).

    The hidden width f is round_up(int(2 * int(d * mlp_ratio) / 3), multiple_of).
    """

    mlp_ratio: float
    multiple_of: int
    use_bias: bool
    init_std: float
    hidden_init: Initializer
    out_init: Initializer
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        d = x.shape[-1]
        f = round_up(int(2 * int(d * self.mlp_ratio) / 3), self.multiple_of)

        kinds = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        init = small_normal(self.init_std)
        gate = nn.silu(Linear(f, kernel_init=init, name="w1", **kinds)(x))  # (n, t, f)
        value = Linear(f, kernel_init=self.hidden_init, name="w2", **kinds)(x)
        return Linear(d, kernel_init=self.out_init, name="w3", **kinds)(gate * value)


class FinalLayer(nn.Module):
    """Modulated layer norm, then a linear map to the p * p * channels values of each patch."""

    out_features: int
    eps: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"], c: Float[Array, "n d"]) -> Float[Array, "n t f"]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        d = x.shape[-1]
        modulation = Linear(
            2 * d,
            kernel_init=zeros,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            name="adaLN_modulation_1",
        )
        shift, scale = jnp.split(modulation(gelu_tanh(c)), 2, axis=-1)
        x = modulate(LayerNorm(self.eps, self.param_dtype, name="norm_final")(x), shift, scale)
        return Linear(self.out_features, kernel_init=zeros, name="linear", **kinds)(x)
