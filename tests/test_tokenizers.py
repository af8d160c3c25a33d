import json
import pathlib

import numpy as np
import pytest

from microdit_jax.encoders.tokenizers import END_OF_TEXT, START_OF_TEXT, ClipTokenizer, clean
from microdit_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "clip_tokens.json"


def tokens(text):
    """The ids of one text between its markers."""
    row = list(ClipTokenizer()([text])[0])
    return row[1 : max(i for i, token in enumerate(row) if token == END_OF_TEXT)]


def test_golden_prompts():
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = ClipTokenizer()([case["text"] for case in cases])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [case["ids"] for case in cases])


@pytest.mark.parametrize("length", [2, 3, 8, 77, 120])
def test_cut_and_padding_at_every_length(length):
    tokenizer = ClipTokenizer(context_length=length)
    texts = ["", "cat", "cat " * (length - 2), "cat " * (length - 1), "cat " * 5000]
    ids = tokenizer(texts)
    cat = tokens("cat")[0]
    for row, words in zip(ids, [0, 1, length - 2, length - 1, 5000], strict=True):
        kept = min(words, length - 2)
        padding = length - 2 - kept
        np.testing.assert_array_equal(
            row, [START_OF_TEXT] + [cat] * kept + [END_OF_TEXT] + [0] * padding
        )
    dropped = [0, max(0, 3 - length), 0, 1, 5002 - length]
    np.testing.assert_array_equal(tokenizer.dropped(texts), dropped)


def test_other_padding():
    texts = ["", "cat", "cat " * 90]
    zeros, ends = ClipTokenizer()(texts), ClipTokenizer(padding=END_OF_TEXT)(texts)
    np.testing.assert_array_equal(ends, np.where(zeros == 0, END_OF_TEXT, zeros))


def test_clean():
    assert clean("  â€œCAFÉ\n\tx&#39;S ") == "\"café x's"
    # Without a "<" in the text ftfy undoes every escape; otherwise two are undone.
    assert clean("<b> &amp;amp;amp;lt; &amp;lt;") == "<b> &amp;lt; <"
    assert clean("&amp;amp;amp;lt;") == "<"
    assert clean("lone \ud800 surrogate") == "lone \ufffd surrogate"


# open_clip 2.24.0 gave these.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <start_of_text> b", [320, START_OF_TEXT, 321]),
        ("a <END_OF_TEXT> b", [320, END_OF_TEXT, 321]),
        ("&lt;end_of_text&gt; b", [END_OF_TEXT, 321]),
        ("<|startoftext|>", [27, 347, 993, 6659, 4160, 91, 285]),
        ("<|endoftext|>", [27, 347, 40786, 4160, 91, 285]),
        ("a\u0345", [320]),
        ("!", [256]),
    ],
)
def test_special_texts(text, expected):
    assert tokens(text) == expected


def test_no_texts():
    assert ClipTokenizer()([]).shape == (0, 77)
    assert ClipTokenizer().dropped([]).shape == (0,)


@pytest.mark.parametrize("method", ["__call__", "dropped"])
def test_bad_texts_are_user_errors(method):
    call = getattr(ClipTokenizer(), method)
    for bad in ("a cat", None, 3):
        with pytest.raises(UserError, match="expected a list of strings; found .*put it in a list"):
            call(bad)
    for bad in (b"cat", None, 3, float("nan"), ["nested"]):
        with pytest.raises(UserError, match="found .* at index 1; decode bytes"):
            call(["fine", bad])


def test_context_too_short_is_a_user_error():
    with pytest.raises(UserError, match="expected 2 or more, the two markers; found 1"):
        ClipTokenizer(context_length=1)
