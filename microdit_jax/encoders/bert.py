"""BERT as a text encoder, such as all-MiniLM-L6-v2, and its tokenizer: one vector for each token.

Alphabet as in microdit_jax.models: n batch, l tokens, d width, f ffn hidden.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from microdit_jax.encoders.clip_block import ACTIVATIONS, TowerConfig, linear, norm
from microdit_jax.encoders.transformer import (
    MASKED,
    PADDING,
    MaskedTextEncoder,
    attend,
    check_texts,
    pad,
)
from microdit_jax.errors import UserError, visible
from microdit_jax.files import read_bytes

MAX_TOKENS = 64  # to which captions are cut where nothing else is said
TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class BertConfig(TowerConfig):
    """Sizes of a BERT, and the types of its computation; the defaults are all-MiniLM-L6-v2's.

    Attributes:
      vocab_size: rows of the token table.
      positions: rows of the table of positions, the most tokens that a text may have.
      types: rows of the table of token types; a caption is of the first.
      max_tokens: tokens l of a text, both markers included.
    """

    width: int = 384
    layers: int = 6
    heads: int = 12
    activation: str = "gelu"
    norm_eps: float = 1e-12
    vocab_size: int = 30522
    positions: int = 512
    types: int = 2
    max_tokens: int = MAX_TOKENS

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.max_tokens <= self.positions:
            raise UserError(
                f"max_tokens of a BERT must be 2 to its {self.positions} positions, found "
                f"{self.max_tokens}"
            )


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + ffn(x)): norms after the sums, unlike CLIP and T5."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, x: Float32[Array, "n l d"], bias: Float32[Array, "n 1 1 l"]
    ) -> Float32[Array, "n l d"]:
        config = self.config
        assert config.ffn is not None  # __post_init__ sets it
        q, k, v = (linear(config, config.width, name)(x) for name in ("query", "key", "value"))
        scale = (config.width // config.heads) ** -0.5
        h = attend(q, k, v, bias, heads=config.heads, scale=scale)
        h = linear(config, config.width, "attention_output")(h).astype(jnp.float32)
        x = norm(config, "attention_norm")(x + h)
        h = ACTIVATIONS[config.activation](linear(config, config.ffn, "ffn_in")(x))  # (n, l, f)
        h = linear(config, config.width, "ffn_out")(h).astype(jnp.float32)
        return norm(config, "ffn_norm")(x + h)


class Bert(nn.Module):
    """Maps token ids (n, l) and a mask, true at text, to the last layer's vectors (n, l, d).

    No token attends to padding, which gets vectors too. Devlin et al. 2019, without pooling.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "n l"], mask: Bool[Array, "n l"]) -> Float32[Array, "n l d"]:
        config = self.config

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, config.width, param_dtype=config.param_dtype, name=name)

        x = table(config.vocab_size, "word_embeddings")(ids).astype(jnp.float32)
        first = jnp.zeros((1,), jnp.int32)
        for rows, name, places in (
            (config.types, "token_type_embeddings", first),
            (config.positions, "position_embeddings", jnp.arange(ids.shape[1])),
        ):
            x = x + jnp.broadcast_to(table(rows, name)(places).astype(jnp.float32), x.shape)
        x = norm(config, "embeddings_norm")(x)
        bias = jnp.where(mask, jnp.float32(0), MASKED)[:, None, None]  # (n, 1, 1, l)
        for i in range(config.layers):
            x = Layer(config, name=f"layer_{i}")(x, bias)
        return x


class BertTokenizer:
    """Texts to BERT's ids and mask, by the tokenizer.json of a folder.

    A row is [CLS], the text, [SEP], then padding. A text that is too long is cut, with [SEP] last;
    `dropped` says by how much. The file's own cutting and padding are not used.
    """

    def __init__(self, folder: str | Path, max_tokens: int = MAX_TOKENS):
        """Raises UserError where `folder` has no tokenizer.json of a BERT."""
        from tokenizers import Tokenizer  # a program that encodes no text does without

        path = Path(folder) / TOKENIZER
        try:
            self._tokenizer = Tokenizer.from_str(read_bytes(path).decode())
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            markers = self._tokenizer.encode("").ids
        # The library raises errors of many types; its panics are no Exception.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise UserError(
                f"expected a BERT's {TOKENIZER} in {visible(folder)}, found "
                f"{type(error).__name__}: {visible(str(error).partition(chr(10))[0], 200)}; fetch "
                "the folder again"
            ) from error
        found = self._tokenizer.token_to_id("[PAD]")
        if found != PADDING or len(markers) != 2:
            raise UserError(
                f"expected [PAD] as 0, and two markers about a text, in {visible(path)}; found "
                f"{found} and {len(markers)} markers; this is not BERT's"
            )
        self.max_tokens = max_tokens

    def __call__(self, texts: Any) -> Int32[np.ndarray, "n {self.max_tokens}"]:
        """Returns the ids (n, max_tokens) int32 of a list of texts; raises as `with_mask`."""
        return self.with_mask(texts)[0]

    def with_mask(
        self, texts: Any
    ) -> tuple[Int32[np.ndarray, "n {self.max_tokens}"], Bool[np.ndarray, "n {self.max_tokens}"]]:
        """Returns ids (n, max_tokens) int32, and which of them are text rather than padding.

        Raises:
          UserError: `texts` is one string, not a list, or holds something that is no string.
        """
        length = self.max_tokens
        encoded = self._encode(texts)
        cut = [t if len(t) <= length else [*t[: length - 1], t[-1]] for t in encoded]
        return pad(cut, length)

    def dropped(self, texts: Any) -> Int32[np.ndarray, " n"]:
        """Counts the tokens of each text that `__call__` cuts off: (n,) int32."""
        lengths = np.array([len(tokens) for tokens in self._encode(texts)], np.int32)
        return np.maximum(lengths - np.int32(self.max_tokens), np.int32(0))

    def _encode(self, texts: Any) -> list[list[int]]:
        check_texts(texts)
        # Half a surrogate pair is no text that the library takes.
        whole = (text.encode(errors="replace").decode() for text in texts)
        return [self._tokenizer.encode(text).ids for text in whole]


class BertEncoder(MaskedTextEncoder):
    """A frozen BERT with its tokenizer; the network sees its vectors of tokens, not their mean.

    Padding gets zero vectors, like a dropped caption: the diffusion model has no padding mask.
    """

    config: BertConfig

    def embed(
        self, params: Mapping[str, Any], ids: Int[Array, "n l"], mask: Bool[Array, "n l"]
    ) -> Float32[Array, "n l d"]:
        """Embeds token ids as a pure function; the mask is true at text."""
        x = jnp.asarray(Bert(self.config).apply({"params": params}, ids, mask))
        return jnp.where(jnp.broadcast_to(mask[:, :, None], x.shape), x, jnp.float32(0))

    @property
    def positions(self) -> int:
        """Most ids that `encode` takes at once."""
        return self.config.positions
