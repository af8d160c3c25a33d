"""CLIP's tokens, offline: the vocabulary comes with the `instant-clip-tokenizer` package."""

import functools
import html
from typing import Any

import ftfy
import instant_clip_tokenizer
import numpy as np
from jaxtyping import Int32

from microdit_jax.encoders.transformer import check_texts
from microdit_jax.errors import UserError

START_OF_TEXT, END_OF_TEXT, PADDING = 49406, 49407, 0
VOCABULARY_SIZE = 49408


class ClipTokenizer:
    """Texts to the ids of CLIP's byte-pair encoding, as open_clip's tokenizer gives them.

    A row is START_OF_TEXT, the text, END_OF_TEXT, then `padding`. A text that is too long is cut,
    with END_OF_TEXT last; `dropped` says by how much. The empty text is the two markers alone. In a
    text "<start_of_text>" and "<end_of_text>" are the markers themselves, as in open_clip, while
    "<|startoftext|>" and "<|endoftext|>" are plain text.

    Equal to open_clip 2.24.0 on every assigned character of Unicode and on 60,000 random strings,
    except that it takes an apostrophe and a long s (U+017F) for the ending "'s" and this does not.
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
        """How many tokens of each text `__call__` cuts off (n,) int32; raises as that does."""
        lengths = np.array([len(tokens) for tokens in _encode(texts)], np.int32)
        return np.maximum(lengths - np.int32(self.context_length - 2), np.int32(0))


def clean(text: str) -> str:
    """open_clip's cleaning: mend mojibake, undo HTML escapes twice, one space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split()).lower()
    # open_clip's pattern matches U+0345 (a Greek accent) nowhere: it ends a word and is dropped.
    return text.replace("\u0345", " ")


@functools.cache
def _vocabulary() -> instant_clip_tokenizer.Tokenizer:
    return instant_clip_tokenizer.Tokenizer()


def _encode(texts: Any) -> list[list[int]]:
    check_texts(texts)
    return [_vocabulary().encode(clean(text)) for text in texts]
