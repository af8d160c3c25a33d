"""Finds the commands in Markdown, lines of code blocks and code spans, and in notebooks."""

import json
import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent.parent
SHELLS = ("bash", "sh", "shell", "console")
OTHER_LANGUAGES = ("python", "text", "bibtex", "dockerfile")  # a block in another one is an error
# A code span is a command if it starts with one of these.
PROGRAMS = r"(?:\S*/)?(?:python3?|pip|make|docker|eval|hf|curl|git|pre-commit)|microdit-[a-z]+"
SPAN = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS})(?:\s|$)")
WORDS = {"until", "while", "do", "done", "exec", "if", "then", "fi", "!"}


class Command(NamedTuple):
    """A command as a page has it.

    Attributes:
      page: the file, below the repository's root.
      text: as written, its continued lines joined and its comment left out.
      block: number of its code block on the page; -1 for a code span.
    """

    page: str
    text: str
    block: int = -1

    @property
    def mention(self) -> bool:
        """True for a span that names a command without any argument, flag or quoted text."""
        given = any("=" in w or w.startswith(("--", '"')) for w in self.text.split()[1:])
        return self.block < 0 and not given


def pages() -> list[pathlib.Path]:
    """Returns the pages that readers see."""
    beside = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    return [*beside, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(markdown: str) -> list[tuple[str, str]]:
    """Returns (language, text) of each fenced code block."""
    found = re.findall(r"^( *)(`{3,})(\w*)\n(.*?)^ *\2$", markdown, re.DOTALL | re.MULTILINE)
    return [(language, text) for _, _, language, text in found]


def commands(name: str, markdown: str) -> list[Command]:
    """Returns the commands of a page, those of blocks first.

    Raises:
      ValueError: a code block in an unknown language, whose commands nobody would run.
    """
    found = []
    for number, (language, text) in enumerate(blocks(markdown)):
        if language in SHELLS:
            found += [Command(name, line, number) for line in logical_lines(text)]
        elif language not in OTHER_LANGUAGES:
            raise ValueError(f"{name}: a code block in {language or 'no language'}: {text[:60]!r}")
    prose = re.sub(r"^ *(`{3,}).*?^ *\1", "", markdown, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        text = " ".join(span.split())
        if SPAN.match(text):
            found.append(Command(name, text))
    return list(dict.fromkeys(found))


def notebooks() -> list[pathlib.Path]:
    """Returns the notebooks that are made of commands."""
    return sorted((ROOT / "docs" / "colab").glob("*.ipynb"))


def notebook_commands(path: pathlib.Path) -> list[Command]:
    """Returns the commands of a notebook (lines with ! or %), with the names that it sets."""
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = dict(re.findall(r'^([A-Z]+) = "(.*?)"', "\n".join(code), re.MULTILINE))
    found = []
    for number, cell in enumerate(code):
        for line in re.findall(r"^[!%](.*)$", cell, re.MULTILINE):
            text = re.sub(r"\{([A-Z]+)\}", lambda match: names[match[1]], line)
            found.append(Command(str(path.relative_to(ROOT)), text, number))
    return found


def all_commands() -> list[Command]:
    """Returns the commands of all pages and notebooks; raises as `commands`."""
    found = [
        command
        for path in pages()
        for command in commands(str(path.relative_to(ROOT)), path.read_text())
    ]
    return found + [command for path in notebooks() for command in notebook_commands(path)]


def logical_lines(block: str) -> list[str]:
    """Joins a shell block's continued lines, and those inside of quotes; drops comments."""
    lines: list[str] = []
    pending = ""
    for line in block.splitlines():
        pending += line if not pending.strip() or "\n" in pending else f" {line.lstrip()}"
        if line.endswith("\\"):
            pending = pending.removesuffix("\\").rstrip()
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # a quote is open
            pending += "\n"
            continue
        if text := without_comment(pending).strip():
            lines.append(text)
        pending = ""
    assert not pending, f"an open quote or a continued last line: {pending!r}"
    return lines


def without_comment(line: str) -> str:
    """Leaves out a comment: # at a word's start, outside of quotes."""
    quote = ""
    for i, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i]
    return line


def python_calls(text: str) -> list[list[str]]:
    """Returns the calls of Python in a command, each its arguments after `python`.

    Looks into strings too, such as srun's or xpk's --command="python ...".
    """
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = []
    call: list[str] | None = None
    for word in lexer:
        if set(word) <= set("();<>|&") or word in WORDS:
            call = None
        elif re.search(r"\bpython[\d.]* ", word):
            inner = word.partition("=")[2] if word.startswith("--") else word
            found += python_calls(re.sub(r"^.*?\$\((.*)\)$", r"\1", inner))
        elif call is None and re.fullmatch(r"(?:\S*/)?python[\d.]*", word):
            call = []
            found.append(call)
        elif call is None and (script := re.fullmatch(r"microdit-(\w+)", word)):
            call = ["-m", f"microdit-{script[1]}"]
            found.append(call)
        elif call is not None:
            call.append(word)
    return found
