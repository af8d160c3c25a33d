"""Every notebook's code runs from top to bottom, with the model that comes along."""

import pathlib

import pytest

from tools.notebook_page import read_cells, run_cell

DOCS = pathlib.Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.delenv("MODEL", raising=False)
    names: dict = {}
    ran = [
        run_cell(source, path.name, names) for kind, source in read_cells(path) if kind == "code"
    ]
    images = [cell.image for cell in ran if cell.image]
    assert len(images) >= 3
    for image in images:
        assert len(image.getcolors(1 << 20)) > 16


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_its_page_shows_the_same_code(path):
    page = path.with_suffix(".md").read_text()
    for _, source in read_cells(path):
        assert source in page, f"python tools/notebook_page.py: {source[:60]} is not there"
