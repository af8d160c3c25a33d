"""A text encoder that comes with the package and knows meaning: one fixed vector for each word.

The vectors were distilled from all-MiniLM-L6-v2 (tools/word_vectors.py): each is what MiniLM says
to that word alone, in fewer dimensions and in 8 bits. So synonyms have similar vectors, while no
vector depends on the words beside it. They lie in `word_vectors.npz`.
"""

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Shaped

from microdit_jax.encoders.on_host import OnHost
from microdit_jax.encoders.transformer import PADDING, check_texts
from microdit_jax.errors import UserError, visible
from microdit_jax.files import read_npz

FILE = Path(__file__).parent / "word_vectors.npz"
MAX_TOKENS = 512
POSITIONS = 16  # dimensions of a vector that tell where in the text its word stands
# Share of a vector's mean square that tells the word; the rest tells its position.
_WORD_SHARE = 0.85
# Cosine from which on a word is similar to another; docs/captions.md has what is above and below
NEAR = 0.45
_LONGEST_WORD = 64  # letters, of which pieces are looked for
_EDGES = re.compile(r"^[^a-z0-9]+|[^a-z0-9]+$")
_PARTS = re.compile(r"[a-z]+|[0-9]+")


class Table(NamedTuple):
    """Words, and their vectors at the same indices.

    Attributes:
      words: the first is padding, ""; pieces that go on with a word begin with "##".
      index: of each word.
      rows: vectors times 127 over each one's largest entry.
      scales: what rows are multiplied by, for an rms of 1 at each word.
    """

    words: list[str]
    index: dict[str, int]
    rows: np.ndarray  # (v, d) int8
    scales: np.ndarray  # (v,) float32


@functools.cache
def table() -> Table:
    """Reads the words and vectors of the package, once.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        arrays = read_npz(FILE)
        words = arrays["words"].tobytes().decode().split("\n")
        rows = arrays["rows"]
        if rows.dtype != np.int8 or rows.ndim != 2 or len(rows) != len(words):
            raise ValueError(f"{len(words)} words and {rows.dtype} {rows.shape}")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"expected word vectors in {FILE}, could not read them ({visible(error, 200)}); "
            "install microdit_jax again"
        ) from error
    norms = np.sqrt(np.mean(np.square(rows, dtype=np.float32), axis=1))
    scales = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    return Table(words, {word: i for i, word in enumerate(words)}, rows, scales)


def knows(word: str) -> bool:
    """Returns True for a word, in lower case, that has a vector of its own."""
    return bool(word) and not word.startswith("##") and plain(word) in table().index


def plain(text: str) -> str:
    """Returns a text in lower case and without accents, as the table spells its words."""
    text = unicodedata.normalize("NFD", text.lower().replace("’", "'"))
    return "".join(c for c in text if unicodedata.category(c) != "Mn")


class WordTokenizer:
    """Texts to ids of words, padded with 0; there are no markers.

    A word of the table is one token, with its hyphens and apostrophes. Of others, runs of letters
    and of digits are looked up; what is not found either is cut into the longest pieces that the
    table has, from its left end. Letters that are not Latin are left out. With words that a network
    knows, one that it does not know is read as the nearest of them, if that is near enough.
    """

    def __init__(self, max_tokens: int, known: "NearWords | None" = None):
        self.max_tokens, self._known = max_tokens, known

    def __call__(self, texts: Any) -> Int32[np.ndarray, "n {self.max_tokens}"]:
        """Returns the ids (n, max_tokens) of a list of texts, cut where they are longer.

        Raises:
          UserError: `texts` is one string, not a list, or holds something that is no string.
        """
        check_texts(texts)
        ids = np.full((len(texts), self.max_tokens), PADDING, np.int32)
        for row, text in zip(ids, texts, strict=True):
            kept = list(itertools.islice(self._ids(text), self.max_tokens))
            row[: len(kept)] = kept
        return ids

    def dropped(self, texts: Any) -> Int32[np.ndarray, " n"]:
        """Counts the tokens of each text that `__call__` cuts off: (n,) int32; raises alike."""
        check_texts(texts)
        lengths = np.array([sum(1 for _ in self._ids(text)) for text in texts], np.int32)
        return np.maximum(lengths - np.int32(self.max_tokens), np.int32(0))

    def _ids(self, text: str) -> Iterator[int]:
        """Yields the ids of a text's words and pieces."""
        index = table().index
        for chunk in plain(text).split():
            chunk = _EDGES.sub("", chunk)
            for part in (chunk,) if chunk in index else _PARTS.findall(chunk):
                if part in index:
                    near = self._known and self._known.nearest(part)
                    yield index[near if near in index else part]
                else:
                    yield from _pieces(part)


def _pieces(word: str) -> Iterator[int]:
    """Yields the ids of the longest pieces from the left; what the table lacks is left out."""
    index = table().index
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        for end in range(min(len(word), start + _LONGEST_WORD), start, -1):
            if (found := index.get(prefix + word[start:end])) is not None:
                yield found
                break
        else:
            end = start + 1
        start = end


@dataclasses.dataclass(frozen=True)
class WordVectors(OnHost):
    """The frozen vectors of words, each with its position in the text in further dimensions.

    Attributes:
      max_tokens: words l of a text, to which `encode_text` pads and cuts.
      known: the words that a network was trained on, as which its prompts are read; None: every
        word is read as itself, as in training.
    Raises:
      UserError: no length from 1 to 512.
    """

    max_tokens: int
    known: "NearWords | None" = None

    def __post_init__(self):
        if not 1 <= self.max_tokens <= MAX_TOKENS:
            raise UserError(
                f"word vectors: expected 1 to {MAX_TOKENS} tokens; found {self.max_tokens}"
            )

    @property
    def name(self) -> str:
        """String that `from_name` reads, "words:tokens=12"."""
        return f"words:tokens={self.max_tokens}"

    @classmethod
    def from_name(cls, name: str) -> "WordVectors":
        """Makes the encoder of this name; raises UserError for a name of another form."""
        match = re.fullmatch(r"words:tokens=(\d{1,12})", name, re.ASCII)
        if match is None:
            raise UserError(
                f"text encoder: expected a name like 'words:tokens=12'; found {visible(name)}"
            )
        return cls(int(match[1]))

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        return table().rows.shape[1] + POSITIONS

    @property
    def tokenizer(self) -> WordTokenizer:
        """Its tokenizer; `tokenizer.dropped(texts)` counts the words that are cut off."""
        return WordTokenizer(self.max_tokens, self.known)

    def encode(
        self,
        ids: Int32[np.ndarray, "n l"],
        attention_mask: Shaped[np.ndarray, "..."] | None = None,
    ) -> Float32[np.ndarray, "n l {self.width}"]:
        """Embeds tokens: (n, l, width) float32, of rms 1 at each token.

        Padding gives zero vectors, like a dropped caption: the network has no padding mask.

        Args:
          attention_mask: makes no difference: the ids say which of them are padding.
        Raises:
          UserError: an id outside the table.
        """
        words = table()
        if ids.size and not 0 <= ids.min() <= ids.max() < len(words.words):
            raise UserError(
                f"token ids: expected 0 to {len(words.words) - 1}; "
                f"found {ids.min()} to {ids.max()}; use WordTokenizer"
            )
        meaning = words.rows[ids] * words.scales[ids][:, :, None]  # (n, l, d)
        width = self.width
        meaning = meaning * np.float32((_WORD_SHARE * width / (width - POSITIONS)) ** 0.5)
        # sin and cos have mean square 1/2.
        position = _positions(ids.shape[1]) * ((1 - _WORD_SHARE) * 2 * width / POSITIONS) ** 0.5
        position = np.broadcast_to(position.astype(np.float32), (*ids.shape, POSITIONS))
        vectors = np.concatenate([meaning, position], axis=2, dtype=np.float32)
        return np.where((ids != PADDING)[:, :, None], vectors, np.float32(0))

    def encode_text(self, texts: Any) -> Float32[np.ndarray, "n {self.max_tokens} {self.width}"]:
        """Embeds a list of texts: (n, max_tokens, width) float32; raises as WordTokenizer."""
        return self.encode(self.tokenizer(texts))


def _positions(length: int) -> np.ndarray:
    """Returns sines and cosines of wavelengths from 6 words to 200: (length, POSITIONS)."""
    frequency = 32.0 ** (-np.arange(POSITIONS // 2) / (POSITIONS // 2 - 1))
    angle = np.arange(length)[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


class NearWords:
    """The words that mean something to a network: those it was trained on, and similar ones."""

    def __init__(self, words: Iterable[str]):
        """Takes the words of training's captions, in lower case."""
        self._words = frozenset(plain(word) for word in words)
        self._found: dict[str, str | None] = {}

    @functools.cached_property
    def _own(self) -> tuple[list[str], Float32[np.ndarray, "n d"]]:
        """Those of the words that have a vector, in order, and their vectors."""
        found = table()
        words = sorted(word for word in self._words if word in found.index)
        rows = [found.index[word] for word in words]
        return words, found.rows[rows] * found.scales[rows][:, None]

    def nearest(self, word: str) -> str | None:
        """Returns the word of training that a word is read as: itself, or one as similar as NEAR.

        Returns:
          None for a word without a vector, or without a similar word.
        """
        word = plain(word)
        if word not in self._found:
            self._found[word] = word if word in self._words else self._most_similar(word)
        return self._found[word]

    def _most_similar(self, word: str) -> str | None:
        found = table()
        words, vectors = self._own
        if word not in found.index or not words:
            return None
        own = found.rows[found.index[word]] * found.scales[found.index[word]]
        cosines = vectors @ own / np.float32(len(own))
        best = int(cosines.argmax())
        return words[best] if cosines[best] >= NEAR else None

    def __contains__(self, word: object) -> bool:
        """True for one of the words, and for one whose vector is near that of one of them."""
        return self.nearest(str(word)) is not None
