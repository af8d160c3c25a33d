"""Parts that CLIP's two towers share: sizes, and the pre-norm transformer block.

BERT takes the sizes, linear layers and norms from here too.

Alphabet as in microdit_jax.models: n batch, l tokens, d width, h heads, c head dim, f ffn hidden.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from microdit_jax.encoders.transformer import MASKED, attend
from microdit_jax.errors import UserError

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's, and DFN5B's
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes of a tower, and the types of its computation.

    Attributes:
      width: d of a token's vector.
      layers: transformer blocks.
      heads: attention heads.
      activation: "quick_gelu", "gelu" or "gelu_tanh"; not to be told from the weights.
      norm_eps: epsilon of every layer norm.
      ffn: hidden width f; None for 4 d.
      dtype: type of the matmuls; residual stream, norms and softmax stay float32.
      param_dtype: type the parameters are stored in.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    ffn: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.ffn is None:
            object.__setattr__(self, "ffn", 4 * self.width)
        for name, allowed in {
            "activation": tuple(ACTIVATIONS),
            "dtype": ("float32", "bfloat16", "float16"),
            "param_dtype": ("float32", "bfloat16", "float16"),
        }.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}"
                )
        if self.heads < 1 or self.width % self.heads:
            raise UserError(
                f"{type(self).__name__} expects heads that divide the width {self.width}, "
                f"found {self.heads}"
            )


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); a causal one looks back only."""

    config: TowerConfig
    causal: bool

    @nn.compact
    def __call__(self, x: Float32[Array, "n l d"]) -> Float32[Array, "n l d"]:
        config, l = self.config, x.shape[1]  # noqa: E741
        h = norm(config, "ln_1")(x)
        q, k, v = jnp.split(linear(config, 3 * config.width, "attn_in_proj")(h), 3, axis=-1)
        seen = jnp.tri(l, dtype=bool) if self.causal else jnp.ones((l, l), bool)
        bias = jnp.where(seen, jnp.float32(0), MASKED)
        scale = (config.width // config.heads) ** -0.5
        h = attend(q, k, v, bias[None, None], heads=config.heads, scale=scale)
        x = x + linear(config, config.width, "attn_out_proj")(h).astype(jnp.float32)
        assert config.ffn is not None  # __post_init__ sets it
        h = linear(config, config.ffn, "mlp_c_fc")(norm(config, "ln_2")(x))  # (n, l, f)
        h = ACTIVATIONS[config.activation](h)
        return x + linear(config, config.width, "mlp_c_proj")(h).astype(jnp.float32)


def linear(config: TowerConfig, features: int, name: str) -> nn.Dense:
    """Returns a linear layer with bias, in the tower's types."""
    return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def norm(config: TowerConfig, name: str) -> nn.LayerNorm:
    """Returns a layer norm in float32."""
    return nn.LayerNorm(
        config.norm_eps,
        dtype=jnp.float32,
        param_dtype=config.param_dtype,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels
        name=name,
    )
