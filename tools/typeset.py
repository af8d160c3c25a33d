"""Turns the formulas of the built docs site into MathML, which browsers typeset without scripts.

python -m tools.typeset     (make docs runs it after the site is built)

Pages are written with TeX between dollar signs, as GitHub shows it too; Arithmatex marks it in the
HTML. Needs latex2mathml.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

import html
import re
from collections.abc import Sequence
from pathlib import Path

from microdit_jax.commands.parser import Parser
from microdit_jax.errors import UserError

SITE = Path(__file__).parent.parent / "site"
MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)


def main(arguments: Sequence[str]) -> None:
    """Typesets every page of the site."""
    Parser("tools.typeset", __doc__).parse_args(arguments)
    total = 0
    for path in sorted(SITE.rglob("*.html")):
        text, count = typeset(path.read_text())
        if count:
            path.write_text(text)
        total += count
    print(f"{total} formulas typeset")


def typeset(page: str) -> tuple[str, int]:
    """Returns a page's HTML with its formulas as MathML, and how many there are."""
    from latex2mathml.converter import convert

    def one(found: re.Match[str]) -> str:
        display = "block" if found["open"] == "[" else "inline"
        formula = convert(html.unescape(found["tex"]).strip(), display=display)
        if unknown := re.findall(r"\\[A-Za-z]+", formula):  # shown as it stands
            raise UserError(f"expected TeX that latex2mathml knows, found {', '.join(unknown)}")
        return formula

    return MARKED.subn(one, page)
