"""CLIP's tokens, offline: the merges of its vocabulary are in `clip_merges.txt`."""

import functools
import gc
import html
import itertools
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from microdit_jax.encoders.transformer import check_texts
from microdit_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers  # a program that encodes no text does without

START_OF_TEXT, END_OF_TEXT, PADDING = 49406, 49407, 0
VOCABULARY_SIZE = 49408

_MERGES = pathlib.Path(__file__).parent / "clip_merges.txt"
# The markers, as what CLIP's merges leave of them.
_MARKERS = {
    START_OF_TEXT: "< start _ of _ text ></w>".split(),
    END_OF_TEXT: "< end _ of _ text ></w>".split(),
}
# open_clip's pattern. It ignores case, where a long s (U+017F) is an s; nothing else in a cleaned
# text, which is lower case, has another spelling.
_PATTERN = (
    r"<[s\u017f]tart_of_text>|<end_of_text>"
    r"|'[s\u017f]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """Texts to the ids of CLIP's byte-pair encoding, as open_clip's tokenizer gives them.

    A row is START_OF_TEXT, the text, END_OF_TEXT, then `padding`. A text that is too long is cut,
    with END_OF_TEXT last; `dropped` says by how much. The empty text is the two markers alone. In a
    text "<start_of_text>" and "<end_of_text>" are the markers themselves, as in open_clip, while
    "<|startoftext|>" and "<|endoftext|>" are plain text.

    Equal to open_clip 2.24.0 on every character of Unicode 16, in several neighbourhoods, and on
    100,000 random strings of these.
    """

    def __init__(self, context_length: int = 77, *, padding: int = PADDING):
        """Raises UserError where `context_length` leaves no room for the two markers.

        Stable Diffusion 1.x pads with END_OF_TEXT, 2.x and OpenCLIP with 0.
        """
        if context_length < 2:
            raise UserError(
                f"context_length: expected 2 or more, the two markers; found {context_length}"
            )
        self.context_length = context_length
        self.padding = padding

    def __call__(self, texts: Any) -> Int32[np.ndarray, "n {self.context_length}"]:
        """The ids (n, context_length) int32 of a list of n texts.

        Raises:
          UserError: `texts` is one string, not a list, or holds something that is no string.
        """
        encoded = _encode(texts)
        ids = np.full((len(encoded), self.context_length), self.padding, np.int32)
        for row, tokens in zip(ids, encoded, strict=True):
            kept = tokens[: self.context_length - 2]
            row[: len(kept) + 2] = [START_OF_TEXT, *kept, END_OF_TEXT]
        return ids

    def dropped(self, texts: Any) -> Int32[np.ndarray, " n"]:
        """Counts the tokens of each text that `__call__` cuts off: (n,) int32; raises alike."""
        lengths = np.array([len(tokens) for tokens in _encode(texts)], np.int32)
        return np.maximum(lengths - np.int32(self.context_length - 2), np.int32(0))


def clean(text: str) -> str:
    """open_clip's cleaning: mend mojibake, undo HTML escapes twice, one space, lower case."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else nothing to mend
        import ftfy  # as slow to load as CLIP's vocabulary

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split()).lower()
    # open_clip's pattern matches U+0345 (a Greek accent) nowhere: it ends a word and is dropped.
    return text.replace("\u0345", " ")


@functools.cache
def _vocabulary() -> "tokenizers.Tokenizer":
    """CLIP's byte-pair encoding; one for all threads, as encoding changes nothing in it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    # Garbage collection would look through all of JAX again and again while the lists grow, and
    # take as long as the rest.
    collecting = gc.isenabled()
    gc.disable()
    try:
        tokenizer = Tokenizer(models.BPE(*_words_and_merges(), end_of_word_suffix="</w>"))
    finally:
        if collecting:
            gc.enable()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _words_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's words with their ids, and the pairs that are merged, the first ones first."""
    _, *lines = _MERGES.read_text(encoding="utf-8").splitlines()  # the first is a version
    pairs = iter(" ".join(lines).split(" "))
    merges = list(zip(pairs, pairs, strict=True))
    # GPT-2's letter for each byte: those that can be seen stand for themselves and come first.
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in seen] + [chr(0x100 + i) for i in range(256 - len(seen))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    ids = dict(zip(words, range(len(words)), strict=True))
    # A marker is one token: merges from its left end on, after all others, which no other word
    # takes, as none has both "<" and letters. No text gets an id from VOCABULARY_SIZE on.
    unused = itertools.count(VOCABULARY_SIZE)
    for token, (start, *pieces) in _MARKERS.items():
        for piece in pieces:
            merges.append((start, piece))
            start += piece
            ids[start] = next(unused)
        ids[start] = token
    return ids, merges


def _encode(texts: Any) -> list[list[int]]:
    check_texts(texts)
    return [_vocabulary().encode(clean(text)).ids for text in texts]
