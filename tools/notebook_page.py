"""Runs docs/generate.ipynb and writes the page docs/generate.md with its outputs and images.

  python -m tools.notebook_page     (MODEL=... takes another model than the one that comes along)

The notebook itself is kept without outputs. Run this again when it changes: a test compares.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

import ast
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from microdit_jax.commands.parser import Parser

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = DOCS / "generate.ipynb"
NOTE = """!!! note
    This page is the notebook `docs/generate.ipynb`, run from top to bottom by
    `tools/notebook_page.py`."""


class Ran(NamedTuple):
    """Output of a code cell: its printed text, and the image it ended with, if any."""

    printed: str
    image: Image.Image | None


def read_cells(path: Path) -> list[tuple[str, str]]:
    """Returns (kind, source) of each cell; kind is "code" or "markdown"."""
    cells = json.loads(path.read_text())["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def run_cell(source: str, name: str, names: dict[str, Any]) -> Ran:
    """Runs a code cell as Jupyter does, in `names`: its last expression is what it shows."""
    *body, last = ast.parse(source).body
    printed, image = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(body, []), name, "exec"), names)
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
            image = value if isinstance(value, Image.Image) else None
        else:
            exec(compile(ast.Module([*body, last], []), name, "exec"), names)
    return Ran(printed.getvalue(), image)


def make_page(path: Path) -> None:
    """Writes NAME.md beside NAME.ipynb, and its images into the folder NAME."""
    names: dict[str, Any] = {}
    parts, shown, folder = [], 0, path.with_suffix("")
    for kind, source in read_cells(path):
        if kind == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        ran = run_cell(source, path.name, names)
        if ran.printed:
            parts.append(f"```text\n{ran.printed.rstrip()}\n```")
        if ran.image is not None:
            folder.mkdir(exist_ok=True)
            shown += 1
            file = folder / f"{shown}.png"
            ran.image.save(file, optimize=True)
            parts.append(f"![What the cell shows]({folder.name}/{file.name})")
    parts.insert(1, NOTE)
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    print(f"wrote {path.with_suffix('.md').name} and {shown} images")


def main(arguments: Sequence[str]) -> None:
    Parser("tools.notebook_page", __doc__).parse_args(arguments)
    make_page(NOTEBOOK)
