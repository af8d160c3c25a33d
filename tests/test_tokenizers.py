import concurrent.futures
import hashlib
import json
import pathlib
import pickle
import random
import subprocess
import sys

import ftfy
import numpy as np
import pytest

from microdit_jax.encoders.tokenizers import END_OF_TEXT, START_OF_TEXT, ClipTokenizer, clean
from microdit_jax.errors import UserError

# Random strings are made of these: code points of Unicode 14, the oldest of a supported Python.
SCRIPTS = [
    (0x20, 0x7E),  # ASCII
    (0x30, 0x39),
    (0x00, 0x1F),  # control characters
    (0x7F, 0x9F),
    (0xA0, 0x17E),  # Latin; U+017F is tested by name
    (0x300, 0x36F),  # combining marks
    (0x391, 0x3A1),  # Greek
    (0x400, 0x52F),  # Cyrillic
    (0x5D0, 0x5EA),  # Hebrew
    (0x620, 0x6FF),  # Arabic
    (0x900, 0x97F),  # Devanagari
    (0xE01, 0xE3A),  # Thai
    (0x1100, 0x11FF),  # Hangul, in parts
    (0x2010, 0x205F),  # punctuation and separators
    (0x2460, 0x24FF),  # numbers in circles
    (0x2600, 0x27BF),  # signs
    (0x3041, 0x3096),  # Hiragana
    (0x4E00, 0x9FFF),  # CJK
    (0xAC00, 0xD7A3),  # Hangul
    (0xE000, 0xE0FF),  # private use
    (0xFE00, 0xFE0F),  # variation selectors
    (0x1D7CE, 0x1D7FF),  # digits of other fonts
    (0x1F300, 0x1F64F),  # emoji
    (0x20000, 0x2A6DF),  # CJK
]
PIECES = (
    [
        "'s",
        "'T",
        "'re",
        "'VE",
        "'m",
        "'ll",
        "'d",
        "'sd",
        "''s",
        "\u2019s",
        " ",
        "  ",
        "\n",
        "\u3000",
    ]
    + ["&amp;", "&lt;", "&#39;", "&amp;amp;quot;", "&nbsp;", "&#28;", "&#837;", "&#x1F600;", "&no;"]
    + [
        "<|endoftext|>",
        "<|startoftext|>",
        "<start_of_text>",
        "<END_OF_TEXT>",
        "<end_of_text",
        "</w>",
    ]
    + [
        "1234567890",
        "3.14",
        "!!!",
        "...",
        "_",
        "#",
        "-- ",
        "a photo of a ",
        "hot pepper",
        "CAF\xc9",
    ]
    + ["\xc3\xa9", "\xe2\u20ac\u2122", "\ufb01", "\xdf", "\u0130", "\u0345", "\u01c5", "e\u0301"]
    + ["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd"]
)

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
        ("!!<start_of_text>", [1443, 283, 1572, 318, 539, 318, 4160, 285]),
        ("<start_of_text><end_of_text>", [START_OF_TEXT, END_OF_TEXT]),
        ("it's it'\u017f", [585, 568, 585, 6, 129, 379]),
        ("<\u017ftart_of_text>", [27, 129, 123, 16707, 62, 684, 62, 18169, 285]),
        ("</w>", [34308, 342, 285]),
        ("2 &amp;amp; 34", [273, 261, 274, 275]),
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


def random_strings(n):
    """n strings of all scripts and of pieces with a meaning, the same on every Python."""
    rng = random.Random(19)  # no mojibake of newer Unicode in these

    def below(bound):
        return int(rng.random() * bound)  # what Python promises to keep, unlike randrange

    for _ in range(n):
        text = ""
        for _ in range(below(12)):
            if below(3):
                low, high = SCRIPTS[below(len(SCRIPTS))]
                text += "".join(chr(low + below(high + 1 - low)) for _ in range(1 + below(8)))
            else:
                text += PIECES[below(len(PIECES))]
        yield text


def test_random_strings_as_instant_clip_tokenizer_had_them():
    # That package gave this digest before `tokenizers` took its place, and so did open_clip 2.24.0.
    digest = hashlib.sha256()
    for row in ClipTokenizer(256)(list(random_strings(5000))):
        digest.update(row.astype("<i4").tobytes())
    assert digest.hexdigest() == "c1936d0839780ca07165fab7034a791b384fdb5b16dc76e8b2a85a754ca158ec"


def test_a_very_long_word():
    (row,) = ClipTokenizer(5)(["ab" * 100_000])
    assert row[0] == START_OF_TEXT and row[-1] == END_OF_TEXT
    assert ClipTokenizer(5).dropped(["7" * 100_000]) == 100_000 - 3


def test_plain_text_is_what_ftfy_leaves_as_it_is():
    plain = [chr(code) for code in range(0x20, 0x7F) if chr(code) != "&"]
    rng = random.Random(0)
    for text in [*plain, *("".join(rng.choices(plain, k=40)) for _ in range(1000))]:
        assert ftfy.fix_text(text) == text


def test_threads_and_pickles():
    texts = list(random_strings(200))
    expected = ClipTokenizer()(texts)
    tokenizer = pickle.loads(pickle.dumps(ClipTokenizer()))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: tokenizer(texts), range(16)):
            np.testing.assert_array_equal(found, expected)


def test_nothing_is_loaded_before_a_text_needs_it():
    program = """
import gc, sys
from microdit_jax.encoders.tokenizers import ClipTokenizer
assert not {"tokenizers", "ftfy", "transformers"} & set(sys.modules)
ClipTokenizer()(["a cat"])
assert "ftfy" not in sys.modules and "transformers" not in sys.modules
assert gc.isenabled()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
