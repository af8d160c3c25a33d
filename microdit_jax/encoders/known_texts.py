"""Embeddings of a few texts, kept when the encoder that made them is not."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Sharding
from jaxtyping import Float32, Int32

from microdit_jax.towers import TextEncoder, Tokenizer


class KnownTexts:
    """A text encoder's answers for some texts: it embeds these and no others.

    It frees the memory of the encoder, whose weights it does not hold.
    """

    def __init__(self, encoder: TextEncoder, texts: Sequence[str]):
        """Embeds each different one of `texts` once."""
        different = sorted(set(texts))
        self.name, self.width, self.max_tokens = encoder.name, encoder.width, encoder.max_tokens
        self.pretrained = encoder.pretrained
        self.tokenizer: Tokenizer | None = encoder.tokenizer
        self.network = None
        self._known = dict(zip(different, encoder.encode_text(different), strict=True))

    def encode(
        self, ids: Int32[np.ndarray, "n l"], attention_mask: Any = None
    ) -> Float32[np.ndarray, "n l d"]:
        """Raises ValueError: embeddings are known by their texts alone."""
        raise ValueError(f"{self.name}: expected one of {len(self._known)} texts, found token ids")

    def encode_text(self, texts: Sequence[str]) -> Float32[np.ndarray, "n l d"]:
        """Embeds texts (n, max_tokens, width); raises KeyError for one that is not known."""
        return np.stack([self._known[text] for text in texts])

    def with_sharding(self, sharding: Sharding) -> "KnownTexts":
        """Returns itself: it computes nothing."""
        return self
