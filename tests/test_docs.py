"""The docs as files: every page is in the menu, every link leads somewhere, every module is shown.

make docs builds the site itself.
"""

import pathlib
import re

import pytest
import yaml

from microdit_jax.errors import MORE
from tools import api_pages

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md"))


def menu(entry) -> list[str]:
    """The files in mkdocs.yml's nav, at any depth."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [file for part in parts for file in menu(part)]


def test_the_menu_has_every_page_once():
    found = menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    api = [f"api/{page}.md" for page in api_pages.grouped()]  # raises for a module on no page
    assert sorted(found) == sorted([*(path.name for path in PAGES), *api])


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    shown = {page: set(modules) for page, modules in api_pages.grouped().items()}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        if file.startswith("api/"):  # made by make docs, which checks the anchors' last part
            names = shown[file.removeprefix("api/").removesuffix(".md")]
            assert not anchor or any(anchor == n or anchor.startswith(f"{n}.") for n in names), (
                target
            )
        else:
            assert not file or (path.parent / file).exists(), f"{path.name}: {target}"


def test_the_page_that_errors_name_is_there():
    assert (ROOT / MORE.removeprefix("more in ")).is_file()


LONG = 2_000  # words, some four screens


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_long_pages_begin_with_their_contents(path):
    """A table ahead of the first section, which links to all of them."""
    before, *sections = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)
    if sum(len(text.split()) for text in sections) < LONG:
        return
    linked = set(re.findall(r"\]\(#([\w-]+)\)", before))
    for section in sections:
        title = section.splitlines()[0].lower()
        anchor = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        assert anchor in linked, f"{path.name} has no link to {title!r} at its beginning"
