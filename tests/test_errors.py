"""Texts of unknown origin in errors: on one line, and nothing that a terminal acts upon."""

import pytest

from microdit_jax.errors import LONGEST, UserError, escaped, visible

HOSTILE = "x\x1b]0;title\x07\x1b[2J\r\nerror: forged\u202e\x9b31m\ud800\u2028"


def test_an_error_shows_what_it_quotes():
    told = str(UserError(f"expected a file, found {HOSTILE}; give another"))
    assert told.isprintable() and "\\x1b[2J" in told and "\\u202e" in told and "\\x9b31m" in told
    assert str(UserError("красный crème 👨‍👩 a\u00a0b")) == "красный crème 👨‍👩 a b"


def test_an_error_within_an_error_is_escaped_once():
    once = UserError(f"found {HOSTILE}")
    assert str(UserError(f"{once}")) == str(once)


def test_an_error_has_an_end():
    assert len(str(UserError("x" * 10**6))) < LONGEST + 50


def test_what_stays():
    assert escaped("a\nb\tc\r\x1b", keep="\n\t") == "a\nb\tc\\r\\x1b"
    assert visible(b"\xff\x1b") == "\\xff\\x1b"


@pytest.mark.parametrize("text", ["", "plain", "ünï", "\U0001f468\u200d\U0001f469"])
def test_plain_texts_are_shown_as_they_are(text):
    assert visible(text) == str(UserError(text)) == text
