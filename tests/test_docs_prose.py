"""The docs as prose: short sentences, and none of those that readers stumbled over.

Spelling is codespell's and style proselint's, in `make lint`.
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
LONGEST = 35  # words

# What readers of earlier versions had to read twice.
STUMBLED_OVER = (
    "its words stand in other captions",
    "What forbids more in the forward pass",
    "no run says it to better than",
    "so are their likes",
    "For machines you do not have",
    "most of their words were not",
    "(asked: 0.9)",
    "The mixer's share does not shrink",
    "machines we do not have",
)


def sentences(markdown: str) -> list[str]:
    """Returns the sentences of a page's prose: no tables, code blocks, HTML or link targets.

    A span of code counts as one word, and each item of a list as a paragraph.
    """
    text = re.sub(r"^(`{3,}).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\${2}.+?\${2}|\$[^$\n]+\$", "FORMULA", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|</?[a-z][^>]*>", "", text, flags=re.DOTALL)
    text = re.sub(r"^(\s*\||#+ |--8<--|!!!).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]+`", "CODE", text)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.MULTILINE)
    ends = r"(?<=[.!?])[\"'*)_]*\s+(?=[\"'*(_]*[A-Z0-9])"
    return [
        " ".join(sentence.split())
        for paragraph in paragraphs
        for sentence in re.split(ends, paragraph)
        if sentence.strip()
    ]


def words(sentence: str) -> int:
    return len([word for word in sentence.split() if re.search(r"\w", word)])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_sentence_is_long(path):
    long = [(words(s), s) for s in sentences(path.read_text()) if words(s) > LONGEST]
    assert not long, "\n".join(f"{count} words: {text}" for count, text in long)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_sentence_that_readers_stumbled_over(path):
    text = " ".join(path.read_text().split())
    assert [phrase for phrase in STUMBLED_OVER if phrase in text] == []


def test_sentences_are_told_apart():
    found = sentences(
        "# A heading\nOne `a b c` two, 0.9 of [three](four/five.md).\nIs it? "
        "It is.\n\n- an item\n- another\n\n| a | table |\n|---|---|\n\n```bash\ncode here\n```\n"
    )
    assert found == ["One CODE two, 0.9 of three.", "Is it?", "It is.", "an item", "another"]
    assert words(" ".join(["word"] * 36)) == 36 > LONGEST
