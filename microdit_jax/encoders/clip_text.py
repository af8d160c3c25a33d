"""CLIP's text transformer, of OpenCLIP and of Stable Diffusion: texts to a vector a token.

Alphabet as in microdit_jax.models: n batch, l tokens, d width, h heads, c head dim, f ffn hidden.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from microdit_jax.encoders.tokenizers import PADDING, VOCABULARY_SIZE, ClipTokenizer
from microdit_jax.encoders.transformer import BATCH, MASKED, attend, check_ids, in_batches
from microdit_jax.errors import UserError

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's, and DFN5B's
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of a text tower, and how it is computed; the defaults are DFN5B-CLIP-ViT-H-14-378's.

    Attributes:
      width: d of a token's vector.
      layers: transformer blocks.
      heads: attention heads.
      context_length: tokens l of a text, both markers included.
      vocab_size: rows of the token table.
      activation: "quick_gelu", "gelu" or "gelu_tanh"; the weights do not tell which.
      norm_eps: epsilon of every layer norm.
      ffn: hidden width f; None for 4 d.
      padding: id after a text's end: 0 (OpenCLIP, SD 2.x) or END_OF_TEXT (SD 1.x).
      dtype: type of the matrix products; residual stream, norms and softmax stay float32.
      param_dtype: type the parameters are stored in.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    context_length: int = 77
    vocab_size: int = VOCABULARY_SIZE
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    ffn: int | None = None
    padding: int = PADDING
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
                f"ClipTextConfig expects heads that divide the width {self.width}, "
                f"found {self.heads}"
            )


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); attention looks back only."""

    config: ClipTextConfig

    @nn.compact
    def __call__(self, x: Float32[Array, "n l d"]) -> Float32[Array, "n l d"]:
        config, l = self.config, x.shape[1]  # noqa: E741
        h = _norm(config, "ln_1")(x)
        q, k, v = jnp.split(_linear(config, 3 * config.width, "attn_in_proj")(h), 3, axis=-1)
        causal = jnp.where(jnp.tri(l, dtype=bool), jnp.float32(0), MASKED)  # (l, l)
        scale = (config.width // config.heads) ** -0.5
        h = attend(q, k, v, causal[None, None], heads=config.heads, scale=scale)
        x = x + _linear(config, config.width, "attn_out_proj")(h).astype(jnp.float32)
        h = _linear(config, config.ffn, "mlp_c_fc")(_norm(config, "ln_2")(x))  # (n, l, f)
        h = ACTIVATIONS[config.activation](h)
        return x + _linear(config, config.width, "mlp_c_proj")(h).astype(jnp.float32)


class ClipText(nn.Module):
    """Token ids (n, l) -> ln_final over all tokens (n, l, d): no pooling and no projection.

    Radford et al. 2021 (CLIP), section 2.4; padding is seen like any token, as it was in training.
    """

    config: ClipTextConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "n l"]) -> Float32[Array, "n l d"]:
        config = self.config
        shape = (config.context_length, config.width)
        table = nn.Embed(
            config.vocab_size, config.width, param_dtype=config.param_dtype, name="token_embedding"
        )
        position = self.param(
            "positional_embedding", nn.initializers.normal(0.01), shape, config.param_dtype
        )
        x = table(ids).astype(jnp.float32)
        x = x + jnp.broadcast_to(position[: ids.shape[1]].astype(jnp.float32), x.shape)
        for i in range(config.layers):
            x = Block(config, name=f"resblocks_{i}")(x)
        return _norm(config, "ln_final")(x)


def _linear(config: ClipTextConfig, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def _norm(config: ClipTextConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        config.norm_eps,
        dtype=jnp.float32,
        param_dtype=config.param_dtype,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels
        name=name,
    )


class ClipTextEncoder:
    """A frozen CLIP text tower with its tokenizer, compiled once for each length of text.

    Attributes:
      name: what data and models carry to find it again.
      tokenizer: its ClipTokenizer; `tokenizer.dropped(texts)` tells what `encode_text` cuts off.
    """

    def __init__(
        self, name: str, config: ClipTextConfig, params: Mapping[str, Any], *, batch: int = BATCH
    ):
        """Texts are encoded `batch` at a time, the last batch filled up; params: `ClipText`'s."""
        self.name = name
        self.config = config
        self.params = params
        self.tokenizer = ClipTokenizer(config.context_length, padding=config.padding)
        self._batch = batch
        self._apply = jax.jit(lambda params, ids: ClipText(config).apply({"params": params}, ids))

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        return self.config.width

    @property
    def max_tokens(self) -> int:
        """Length to which `encode_text` pads and cuts."""
        return self.config.context_length

    def encode(self, ids: Int32[np.ndarray, "n l"]) -> Float32[np.ndarray, "n l d"]:
        """Vectors (n, l, width) float32 of token ids.

        Raises:
          UserError: more tokens than positions, or an id outside the vocabulary.
        """
        check_ids(ids, self.config.context_length, self.config.vocab_size, self.name)
        return in_batches(functools.partial(self._apply, self.params), ids, size=self._batch)

    def encode_text(self, texts: Any) -> Float32[np.ndarray, "n l d"]:
        """Vectors (n, context_length, width) float32 of a list of texts; raises as ClipTokenizer.

        A text that is too long is cut, with END_OF_TEXT last.
        """
        return self.encode(self.tokenizer(texts))
