"""A text encoder that needs no download: a fixed random vector for each token and position.

A network can learn from it on small data, since captions differ where their words do. It knows
nothing of meaning: use a pretrained encoder for anything else.
"""

import dataclasses
import re
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Shaped, UInt64

from microdit_jax.encoders.on_host import OnHost
from microdit_jax.encoders.tokenizers import PADDING, VOCABULARY_SIZE, ClipTokenizer
from microdit_jax.errors import UserError, visible

# Share of a vector's variance that tells the token; the rest tells its position.
_TOKEN_SHARE = 0.75
MAX_WIDTH, MAX_TOKENS = 2**16, 2**12  # of a table; a stranger's model may name any


@dataclasses.dataclass(frozen=True)
class TokenTable(OnHost):
    """A frozen random table over CLIP's 49,408 ids, plus sinusoidal positions.

    Attributes:
      width: of a token vector; even.
      max_tokens: length to which `encode_text` pads and cuts, both markers included.
      seed: of the table; a row depends on (seed, id, width) alone, not on a library's generator.
    Raises:
      UserError: an odd width, no room for the markers, a seed outside [0, 2**32).
    """

    width: int
    max_tokens: int
    seed: int

    def __post_init__(self):
        if self.width < 2 or self.width % 2:
            raise UserError(f"token table: expected an even width; found {self.width}")
        if self.max_tokens < 2:
            raise UserError(f"token table: expected tokens >= 2; found {self.max_tokens}")
        if self.width > MAX_WIDTH or self.max_tokens > MAX_TOKENS:
            raise UserError(
                f"token table: expected a width up to {MAX_WIDTH} and up to {MAX_TOKENS} tokens; "
                f"found {self.width} and {self.max_tokens}"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"token table: expected a seed in [0, 2**32); found {self.seed}")

    @property
    def name(self) -> str:
        """String that `from_name` reads, e.g. "table:width=256,tokens=24,seed=0"."""
        return f"table:width={self.width},tokens={self.max_tokens},seed={self.seed}"

    @classmethod
    def from_name(cls, name: str) -> "TokenTable":
        """Makes the encoder of this name; raises UserError for a name of another form."""
        match = re.fullmatch(
            r"table:width=(\d{1,12}),tokens=(\d{1,12}),seed=(\d{1,12})", name, re.ASCII
        )
        if match is None:
            raise UserError(
                f"text encoder: expected a name like 'table:width=256,tokens=24,seed=0'; "
                f"found {visible(name)}"
            )
        return cls(*map(int, match.groups()))

    @property
    def tokenizer(self) -> ClipTokenizer:
        """CLIP's tokenizer; `tokenizer.dropped(texts)` counts the tokens that are cut off."""
        return ClipTokenizer(self.max_tokens)

    def encode(
        self,
        ids: Int32[np.ndarray, "n l"],
        attention_mask: Shaped[np.ndarray, "..."] | None = None,
    ) -> Float32[np.ndarray, "n l {self.width}"]:
        """Embeds tokens: (n, l, width) float32, of rms 1 in expectation at each token.

        The zeros after a row's last token are padding and give zero vectors, like a dropped
        caption: the network has no padding mask, and so the mean over tokens is that of the real
        ones, scaled. A zero amid the text is a real token ("!" glued to the next word).

        Args:
          attention_mask: makes no difference: the ids say which of them are padding.
        Raises:
          UserError: an id outside the vocabulary.
        """
        if ids.size and not 0 <= ids.min() <= ids.max() < VOCABULARY_SIZE:
            raise UserError(
                f"token ids: expected 0 to {VOCABULARY_SIZE - 1}; "
                f"found {ids.min()} to {ids.max()}; use ClipTokenizer"
            )
        used, where = np.unique(ids, return_inverse=True)
        table = np.float32(_TOKEN_SHARE**0.5) * self._rows(used)
        # sin and cos have mean square 1/2.
        position = np.float32((2 * (1 - _TOKEN_SHARE)) ** 0.5) * self._positions(ids.shape[1])
        vectors = table[where.reshape(ids.shape)] + position  # (n, l, width)
        last_first = (ids != PADDING)[:, ::-1]
        real = np.logical_or.accumulate(last_first, axis=1)[:, ::-1]  # (n, l)
        return np.where(real[:, :, None], vectors, np.float32(0))

    def encode_text(self, texts: Any) -> Float32[np.ndarray, "n {self.max_tokens} {self.width}"]:
        """Embeds a list of texts: (n, max_tokens, width) float32; raises as ClipTokenizer."""
        return self.encode(self.tokenizer(texts))

    def _rows(self, ids: Int32[np.ndarray, " u"]) -> Float32[np.ndarray, "u {self.width}"]:
        """Makes N(0, 1) rows by Box-Muller on hashes of (seed, id, pair)."""
        pairs = np.arange(self.width // 2, dtype=np.uint64)
        row = np.uint64(self.seed) << np.uint64(32) | ids.astype(np.uint64)
        bits = _splitmix64(_splitmix64(row)[:, None] + pairs)  # (u, width / 2)
        high, low = bits >> np.uint64(32), bits & np.uint64(2**32 - 1)
        radius = np.sqrt(-2 * np.log((high + 0.5) * 2.0**-32))
        angle = 2 * np.pi * 2.0**-32 * low
        normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return normals.astype(np.float32)

    def _positions(self, length: int) -> Float32[np.ndarray, "{length} {self.width}"]:
        frequency = 10000.0 ** (-np.arange(self.width // 2) / (self.width // 2))
        angle = np.arange(length)[:, None] * frequency  # (l, width / 2)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def _splitmix64(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Mixes 64 bits to 64, one to one, by SplitMix64's function (Steele, Lea and Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
