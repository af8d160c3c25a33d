"""Building blocks without attention: linear layers, norms, embeddings, dense feed-forwards."""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32

from microdit_jax.models import matmuls, norms
from microdit_jax.models.activations import gelu_tanh, swiglu

Initializer = Callable[..., Array]

# The reference draws these from a normal cut at +-2 *absolute*, 100 standard deviations out:
# the cut never acts, so this is the plain normal.
small_normal = nn.initializers.normal
xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()

TIMESTEP_FEATURES = 512  # sin-cos features of the noise level


@dataclasses.dataclass(frozen=True)
class Precision:
    """Types of a layer: `dtype` of its matmuls and attention, `param_dtype` of its parameters."""

    dtype: str
    param_dtype: str

    def in_float32(self) -> "Precision":
        """The same parameters, multiplied in float32."""
        return dataclasses.replace(self, dtype="float32")


def linear(
    features: int,
    precision: Precision,
    *,
    use_bias: bool = True,
    kernel_init: Initializer = xavier,
    bias_init: Initializer = zeros,
    name: str | None = None,
) -> nn.Dense:
    """A linear layer with the reference's default initialisation: Xavier-uniform, zero bias."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=precision.dtype,
        param_dtype=precision.param_dtype,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dot_general=matmuls.dot_general,
        promote_dtype=matmuls.narrow_inputs,
        name=name,
    )


class Weights(nn.Module):
    """The matrix (d, f) and the bias (f,), or None, of a `linear` layer."""

    features: int
    precision: Precision
    use_bias: bool
    kernel_init: Initializer

    @nn.compact
    def __call__(self, d: int) -> tuple[Float[Array, "d f"], Float[Array, " f"] | None]:
        stored = self.precision.param_dtype
        kernel = self.param("kernel", self.kernel_init, (d, self.features), stored)
        bias = self.param("bias", zeros, (self.features,), stored) if self.use_bias else None
        return kernel, bias


class SplitLinear(nn.Module):
    """A `linear` layer in equal parts of its result (`matmuls.matmul_parts`).

    Attributes:
      features: width of a part.
    """

    parts: int
    features: int
    precision: Precision
    use_bias: bool
    kernel_init: Initializer

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b d"], scale: Float32[Array, " d"] | None = None
    ) -> tuple[Float[Array, "*b f"], ...]:
        """Returns the parts for x, or for x times `scale`, which the smaller matrix takes."""
        dtype, stored = self.precision.dtype, self.precision.param_dtype
        width = self.parts * self.features
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], width), stored)
        if scale is not None:
            kernel = matmuls.scaled_matrix(kernel, scale, dtype)
        results = matmuls.matmul_parts(x.astype(dtype), kernel, self.parts)
        if not self.use_bias:
            return results
        bias = self.param("bias", zeros, (width,), stored).astype(dtype)
        split = jnp.split(bias, self.parts)
        return tuple(r + b[None, None] for r, b in zip(results, split, strict=True))


class LayerNorm(nn.Module):
    """Layer norm over the last axis with a scale and no bias, computed in float32.

    With `shift` and `scale` it is DiT's adaptive layer norm. The result has the type of the
    matmuls, which would cast it themselves.
    """

    eps: float
    precision: Precision

    @nn.compact
    def _weight(self, d: int) -> Float32[Array, " d"]:
        init = nn.initializers.ones
        return self.param("scale", init, (d,), self.precision.param_dtype).astype(jnp.float32)

    def before_matrix(
        self, x: Float[Array, "*b d"], *, gradient_dtype: str
    ) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"], Float32[Array, " d"]]:
        """Returns x, its norm without the scale, and the scale, for the matrix that comes next.

        The scale's gradient is then no sum over tokens.
        """
        x, h = norms.scaled_norm(x, None, self.eps, self.precision.dtype, gradient_dtype)
        return x, h, self._weight(x.shape[-1])

    def beside_stream(
        self,
        x: Float[Array, "*b d"],
        shift: Float[Array, "n d"] | None = None,
        scale: Float[Array, "n d"] | None = None,
        *,
        gradient_dtype: str = "float32",
    ) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
        """Returns x and its norm; a residual stream goes on from the x that is returned.

        Args:
          gradient_dtype: type that the gradient of x is rounded to on its way through memory.
        """
        weight = self._weight(x.shape[-1])
        types = self.precision.dtype, gradient_dtype
        if shift is None or scale is None:
            return norms.scaled_norm(x, weight, self.eps, *types)
        return norms.modulated_norm(x, weight, shift, scale, self.eps, *types)

    def __call__(
        self,
        x: Float[Array, "*b d"],
        shift: Float[Array, "n d"] | None = None,
        scale: Float[Array, "n d"] | None = None,
    ) -> Float[Array, "*b d"]:
        return self.beside_stream(x, shift, scale)[1]


def residual_sum(
    x: Float[Array, "*b d"], branch: Float[Array, "*b d"], gate: Float[Array, "n d"] | None = None
) -> Float[Array, "*b d"]:
    """Adds a branch, times its gate, to the residual stream, in float32; returns x's type."""
    if gate is None and x.dtype == branch.dtype:  # the same sum, which XLA takes into a matmul
        return x + branch
    branch = branch.astype(jnp.float32)
    branch = branch if gate is None else gate[:, None, :] * branch
    return (x.astype(jnp.float32) + branch).astype(x.dtype)


class PatchEmbed(nn.Module):
    """Linear map of flattened p x p patches: the reference's strided convolution.

    The kernel's input axis runs over (channel, row, column), as the convolution's weight does.
    """

    dim: int
    patch_size: int
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "n height width channels"]) -> Float[Array, "n t d"]:
        p = self.patch_size
        bound = 1 / math.sqrt(p * p * x.shape[-1])

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        # (n, height, width, channels) -> (n, t, channels * p * p)
        patches = rearrange(x, "n (h p) (w q) c -> n (h w) (c p q)", p=p, q=p)
        return linear(self.dim, self.precision, bias_init=uniform, name="proj")(patches)


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
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))  # (d / 4,)
    # float32 here, as the reference has it: it matters for scales that are not a power of two.
    position = np.arange(grid, dtype=np.float32) / np.float32(pos_interp_scale)  # (grid,)
    angles = np.outer(position.astype(np.float64), omega)  # (grid, d / 4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, d / 2)
    column = np.broadcast_to(axis[None, :, :], (grid, grid, dim // 2))
    row = np.broadcast_to(axis[:, None, :], (grid, grid, dim // 2))
    table = np.concatenate([column, row], axis=-1)  # (grid, grid, d)
    return table.reshape(grid * grid, dim).astype(np.float32)


def timestep_embedding(
    t: Float[Array, " n"], dim: int = TIMESTEP_FEATURES, max_period: float = 10000.0
) -> Float[Array, "n dim"]:
    """[cos, sin] features of t at dim/2 frequencies max_period^(-i / (dim/2)), in float32."""
    half = dim // 2
    steps = jnp.arange(half, dtype=jnp.float32)
    frequencies = jnp.exp(-math.log(max_period) * steps / half)  # (dim / 2,)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]  # (n, dim / 2)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """Maps c_noise (n,) to (n, d): sin-cos features, then a two-layer MLP."""

    dim: int
    init_std: float
    precision: Precision

    @nn.compact
    def __call__(self, t: Float[Array, " n"]) -> Float[Array, "n d"]:
        init, precision = small_normal(self.init_std), self.precision
        features = timestep_embedding(t).astype(precision.dtype)  # (n, 512)
        x = gelu_tanh(linear(self.dim, precision, kernel_init=init, name="mlp_0")(features))
        return linear(self.dim, precision, kernel_init=init, name="mlp_2")(x)


class Mlp(nn.Module):
    """fc1 -> GELU(tanh) -> layer norm -> fc2, for caption embeddings and their mean."""

    dim: int
    eps: float
    init_std: float
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "*b f"]) -> Float[Array, "*b d"]:
        init, precision = small_normal(self.init_std), self.precision
        x = gelu_tanh(linear(self.dim, precision, kernel_init=init, name="fc1")(x))  # (*b, d)
        x = LayerNorm(self.eps, precision, name="norm")(x)
        return linear(self.dim, precision, kernel_init=init, name="fc2")(x)


class CaptionProjection(nn.Module):
    """Maps caption embeddings (n, l, caption_channels) to (n, l, d)."""

    dim: int
    eps: float
    init_std: float
    precision: Precision

    @nn.compact
    def __call__(self, y: Float[Array, "n l f"]) -> Float[Array, "n l d"]:
        return Mlp(self.dim, self.eps, self.init_std, self.precision, name="y_proj")(y)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w3(silu(w1 x) * w2 x), with hidden width f."""

    hidden: int
    use_bias: bool
    init_std: float
    hidden_init: Initializer
    out_init: Initializer
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        def layer(name: str, features: int, init: Initializer) -> nn.Dense:
            return linear(
                features, self.precision, use_bias=self.use_bias, kernel_init=init, name=name
            )

        inits = {"w1": small_normal(self.init_std), "w2": self.hidden_init}
        if self.precision.dtype == "float32":  # to the bit as ever
            gate, value = (layer(name, self.hidden, init)(x) for name, init in inits.items())
            hidden = nn.silu(gate) * value  # (n, t, f)
        else:
            weights = [
                Weights(self.hidden, self.precision, self.use_bias, init, name=name)(x.shape[-1])
                for name, init in inits.items()
            ]
            (w1, b1), (w2, b2) = weights
            both = matmuls.matmul_pair(x.astype(self.precision.dtype), w1, w2)  # (n, t, 2 f)
            if b1 is not None and b2 is not None:
                both = both + jnp.concatenate([b1, b2]).astype(both.dtype)[None, None]
            hidden = swiglu(both)
        return layer("w3", x.shape[-1], self.out_init)(hidden)


class FinalLayer(nn.Module):
    """Modulated layer norm, then a linear map to the p * p * channels values of each patch."""

    out_features: int
    eps: float
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"], c: Float[Array, "n d"]) -> Float[Array, "n t f"]:
        modulation = linear(
            2 * x.shape[-1],
            self.precision.in_float32(),
            kernel_init=zeros,
            name="adaLN_modulation_1",
        )
        shift, scale = jnp.split(modulation(gelu_tanh(c)), 2, axis=-1)  # each (n, d)
        x = LayerNorm(self.eps, self.precision, name="norm_final")(x, shift, scale)
        return linear(self.out_features, self.precision, kernel_init=zeros, name="linear")(x)
