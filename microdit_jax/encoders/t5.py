"""The T5 v1.1 encoder and its tokenizer: one vector for each token.

Alphabet as in microdit_jax.models: n batch, l tokens, d width, h heads, c head dim, f ffn hidden.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from microdit_jax.encoders.transformer import (
    MASKED,
    PADDING,
    MaskedTextEncoder,
    attend,
    check_texts,
    pad,
)
from microdit_jax.errors import UserError, visible

_MARKERS = ("<pad>", "</s>", "<unk>", "▁")
MAX_TOKENS = 120  # to which the reference cuts captions


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder, and the types of its computation; the defaults are XXL's.

    Attributes:
      width: d of a token's vector.
      layers: blocks of attention and feed-forward.
      heads: attention heads h.
      head_dim: width c of a head; h c may differ from d.
      ffn: hidden width f of the gated feed-forward.
      vocab_size: rows of the token table.
      buckets: rows of the table of relative positions, half of them for keys after the query.
      max_distance: distances from here on share one bucket.
      norm_eps: epsilon of every norm.
      max_tokens: tokens l of a text, the end marker included.
      dtype: type of the matmuls, "float32" or "bfloat16": T5 overflows in float16. The
        residual stream, norms and softmax stay float32.
      param_dtype: type the parameters are stored in.
    """

    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    ffn: int = 10240
    vocab_size: int = 32128
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    max_tokens: int = MAX_TOKENS
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise UserError(
                    f"{name} of T5 must be float32 or bfloat16 (it overflows in float16), "
                    f"found {getattr(self, name)!r}"
                )
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise UserError(
                "T5Config expects buckets in a multiple of 4 and max_distance above a quarter of "
                f"them, found {self.buckets} and {self.max_distance}"
            )


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int32[np.ndarray, "l l"]:
    """Returns the bucket of every (query, key) pair (Raffel et al. 2020, section 2.1).

    Half of the buckets are for keys after the query. In each half, the first half hold one distance
    each; the others grow geometrically up to max_distance, and the last takes all larger ones.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]  # key - query
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(offset)
    # In float32, as the reference rounds.
    steps = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = steps / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return (half * (offset > 0) + np.where(distance < exact, distance, far)).astype(np.int32)


class RMSNorm(nn.Module):
    """x / rms(x) times a scale, in and to float32 (Zhang and Sennrich 2019); no mean, no bias."""

    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float32[Array, "n l d"]) -> Float32[Array, "n l d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
        return x * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); no biases, no 1/sqrt(c)."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x: Float32[Array, "n l d"], bias: Float32[Array, "n h l l"]
    ) -> Float32[Array, "n l d"]:
        config = self.config
        inner = config.heads * config.head_dim
        h = _norm(config, "layer_norm_0")(x)
        q, k, v = (_linear(config, inner, f"attention_{name}")(h) for name in "qkv")
        h = attend(q, k, v, bias, heads=config.heads, scale=1.0)
        x = x + _linear(config, config.width, "attention_o")(h).astype(jnp.float32)
        h = _norm(config, "layer_norm_1")(x)
        gate = jax.nn.gelu(_linear(config, config.ffn, "ffn_wi_0")(h), approximate=True)
        h = gate * _linear(config, config.ffn, "ffn_wi_1")(h)  # (n, l, f)
        return x + _linear(config, config.width, "ffn_wo")(h).astype(jnp.float32)


class T5(nn.Module):
    """Maps token ids (n, l) and a mask, true at text, to vectors (n, l, d) after the final norm.

    No token attends to padding, which gets vectors too. Raffel et al. 2020 with v1.1's changes.
    """

    config: T5Config

    @nn.compact
    def __call__(self, ids: Int[Array, "n l"], mask: Bool[Array, "n l"]) -> Float32[Array, "n l d"]:
        config, l = self.config, ids.shape[1]  # noqa: E741
        embed = functools.partial(nn.Embed, param_dtype=config.param_dtype)
        x = embed(config.vocab_size, config.width, name="shared")(ids)
        x = x.astype(jnp.float32)
        table = embed(config.buckets, config.heads, name="relative_attention_bias")
        near = table(relative_buckets(l, config.buckets, config.max_distance))  # (l, l, h)
        near = near.transpose(2, 0, 1)[None].astype(jnp.float32)
        unseen = jnp.where(mask, jnp.float32(0), MASKED)[:, None, None]
        shape = (len(ids), config.heads, l, l)
        bias = jnp.broadcast_to(near, shape) + jnp.broadcast_to(unseen, shape)
        for i in range(config.layers):
            x = Block(config, name=f"block_{i}")(x, bias)
        return _norm(config, "final_layer_norm")(x)


def _linear(config: T5Config, features: int, name: str) -> nn.Dense:
    return nn.Dense(
        features, use_bias=False, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )


def _norm(config: T5Config, name: str) -> RMSNorm:
    return RMSNorm(config.norm_eps, config.param_dtype, name=name)


class T5Tokenizer:
    """Texts to T5's ids and mask, by the tokenizer of a folder or of a repository on the hub."""

    def __init__(self, source: str, max_tokens: int = MAX_TOKENS):
        """Raises UserError where there is no T5 tokenizer at `source`, or no way to read it."""
        # Else transformers warns that PyTorch is missing, which is not needed here.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError(
                "T5's tokenizer needs transformers, found none; pip install transformers"
            ) from error
        try:
            # Never code of that folder, nor the library's question whether to run it.
            self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            found = type(self._tokenizer).__name__
            if not found.startswith(
                ("T5Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
            ):
                raise ValueError(f"a tokenizer of another kind, {found}")
        # The library raises errors of many types, for a missing file as for another tokenizer's;
        # a panic of tokenizers is no Exception.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            reason = visible(str(error).partition("\n")[0])
            raise UserError(
                f"expected a T5 tokenizer (tokenizer.json or spiece.model) at {visible(source)}, "
                f"found {type(error).__name__}: {reason}; give its folder"
            ) from error
        if (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id) != (PADDING, 1):
            raise UserError(
                f"expected T5's padding 0 and end marker 1 in the tokenizer of {source}, found "
                f"{self._tokenizer.pad_token_id} and {self._tokenizer.eos_token_id}"
            )
        # Without a vocabulary file the library makes up a vocabulary of markers alone.
        if all(w in _MARKERS or w.startswith("<extra_id_") for w in self._tokenizer.get_vocab()):
            raise UserError(
                f"expected T5's vocabulary (tokenizer.json or spiece.model) at {source}, found "
                "none; fetch the folder again"
            )
        self.max_tokens = max_tokens

    def __call__(self, texts: Any) -> Int32[np.ndarray, "n {self.max_tokens}"]:
        """Returns the ids (n, max_tokens) int32 of a list of texts; raises as `with_mask`."""
        return self.with_mask(texts)[0]

    def with_mask(
        self, texts: Any
    ) -> tuple[Int32[np.ndarray, "n {self.max_tokens}"], Bool[np.ndarray, "n {self.max_tokens}"]]:
        """Returns ids (n, max_tokens) int32, and which of them are text rather than padding.

        A text that is too long is cut, with the end marker last.

        Raises:
          UserError: `texts` is one string, not a list, or holds something that is no string.
        """
        return pad(
            self._encode(texts, truncation=True, max_length=self.max_tokens), self.max_tokens
        )

    def dropped(self, texts: Any) -> Int32[np.ndarray, " n"]:
        """Counts the tokens of each text that `__call__` cuts off: (n,) int32."""
        lengths = np.array([len(tokens) for tokens in self._encode(texts)], np.int32)
        return np.maximum(lengths - np.int32(self.max_tokens), np.int32(0))

    def _encode(self, texts: Any, **options) -> list[list[int]]:
        check_texts(texts)
        return self._tokenizer(list(texts), **options)["input_ids"] if len(texts) else []


class T5Encoder(MaskedTextEncoder):
    """A frozen T5 encoder, compiled once for each length of text; padding gets vectors too."""

    config: T5Config

    def embed(
        self, params: Mapping[str, Any], ids: Int[Array, "n l"], mask: Bool[Array, "n l"]
    ) -> Float32[Array, "n l d"]:
        """Embeds token ids as a pure function; the mask is true at text."""
        return jnp.asarray(T5(self.config).apply({"params": params}, ids, mask))
