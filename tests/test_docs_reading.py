"""A reading test: ten questions, and whether a reader of the README finds the page that answers.

A reader follows a link only where the words around it speak of the question: a row of a table, an
item of a list or a paragraph. Two clicks must do. What the site's search finds is asked in a
browser, by `make test-docs`.
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"

# Question -> what the words around a link may say, the page, its heading, what the section says.
QUESTIONS = {
    "What is the EDM loss?": (
        "loss|how it works", "docs/how-it-works.md", "5. Diffusion: the EDM loss", r"\sigma",
    ),
    "Where does the mask act?": (
        "mask|how it works", "docs/how-it-works.md", "2. The patch mixer, and where the mask acts",
        "75 %",
    ),
    "How do I add an attention kernel?": (
        "attention kernel", "CONTRIBUTING.md", "Where to change what", "`IMPLEMENTATIONS`",
    ),
    "How do I prepare data of my own?": (
        "your own", "docs/data.md", "Your own data: pictures with captions",
        "python -m microdit_jax.prepare --source=folder",
    ),
    "How do I convert a checkpoint?": (
        "convert", "docs/converting.md", "Converting", "python -m convert --kind=dit",
    ),
    "How does training resume?": (
        "resume|training", "docs/training.md", "Stop and resume", "until python train_main.py",
    ),
    "Which mesh for 16 GPUs?": (
        "devices|mesh", "docs/scaling.md", "Which mesh", "16 GPUs in two nodes of eight",
    ),
    "Which solver do I take?": (
        "solver", "docs/sampling.md", "Which solver to take", "--solver=ab3",
    ),
    "What fits into 24 GB?": (
        "GPU|memory", "docs/gpu.md", "Which card suffices", "24 GB",
    ),
    "What is exact?": (
        "parity|exact|equal", "docs/parity.md", "What is exact, and what is close", "bit for bit",
    ),
}  # fmt: skip


def surroundings(markdown: str) -> list[str]:
    """Returns the rows, items and paragraphs of a page, without its code blocks."""
    text = re.sub(r"^(`{3,}).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.) ?)", text)


def links(page: pathlib.Path, words: str) -> set[pathlib.Path]:
    """Returns the pages that a page links to, where the words around the link speak of `words`."""
    found = set()
    for part in surroundings(page.read_text()):
        if re.search(words, part, re.IGNORECASE):
            targets = re.findall(r"\]\(([^)#\s:]+\.md)(?:#[^)]*)?\)", part)
            found |= {(page.parent / target).resolve() for target in targets}
    return {path for path in found if path.is_file()}


def section(page: pathlib.Path, heading: str) -> str:
    """Returns what stands below a heading, up to the next one of its level or above."""
    text = page.read_text()
    start = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert start, f"{page.name} has no heading {heading!r}"
    rest = text[start.end() :]
    end = re.search(rf"^#{{1,{len(start[1])}}} (?=[A-Z0-9])", rest, re.MULTILINE)
    return rest if end is None or start[1] == "#" else rest[: end.start()]


def found_in_two_clicks(words: str, page: pathlib.Path) -> bool:
    first = links(ROOT / "README.md", words)
    return page in first or any(page in links(path, words) for path in first)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_two_clicks_from_the_readme(question):
    words, page, heading, says = QUESTIONS[question]
    assert says in section(ROOT / page, heading)
    assert found_in_two_clicks(words, (ROOT / page).resolve())


def test_a_link_that_does_not_speak_of_the_question_is_not_followed():
    assert not found_in_two_clicks("zebra", (DOCS / "data.md").resolve())

    assert surroundings("a [b](c.md)\n\n| d |\n| e [f](g.md) |\n- h\n") == [
        "a [b](c.md)", "| d |", "| e [f](g.md) |", "- h\n",
    ]  # fmt: skip
