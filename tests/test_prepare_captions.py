"""Cleaned captions equal the reference's on strings that touch each of its rules."""

import json

import pytest
from conftest import GOLDEN

from microdit_jax.prepare.captions import clean

CASES = json.loads((GOLDEN / "captions.json").read_text())


def test_equal_to_the_reference():
    assert len(CASES) > 400
    wrong = [(text, clean(text), expected) for text, expected in CASES if clean(text) != expected]
    assert not wrong
    # the cases are hard: most are changed, not all to nothing
    assert sum(text != expected for text, expected in CASES) > 300
    assert sum(bool(expected) for _, expected in CASES) > 300


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A <b>Dog</b>, see http://a.example.com/x.html", "a dog, see html"),
        ("二匹の猫 Two&nbsp;Cats", "の two cats"),
        ("“Free shipping” – ***NEW*** jc6640", '" - new'),
        ("漢字", ""),
    ],
)
def test_examples(text, expected):
    assert clean(text) == expected
