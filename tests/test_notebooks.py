"""Every notebook's code runs from top to bottom, with the model that comes along."""

import ast
import json
import pathlib
import re

import pytest

from tools.notebook_page import read_cells, run_cell

DOCS = pathlib.Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))
COLAB = sorted((DOCS / "colab").glob("*.ipynb"))  # of commands; make test-commands runs these


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


@pytest.mark.parametrize("path", [*NOTEBOOKS, *COLAB], ids=lambda path: path.name)
def test_is_a_notebook_without_outputs(path):
    """The parts of Jupyter's format 4.5 (nbformat.v4.5.schema.json) that a notebook of ours has."""
    notebook = json.loads(path.read_text())
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        own = {"code": {"execution_count", "outputs"}, "markdown": set()}[cell["cell_type"]]
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | own
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        assert all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])


@pytest.mark.parametrize("path", COLAB, ids=lambda path: path.name)
def test_cells_of_python_can_be_parsed(path):
    for kind, source in read_cells(path):
        if kind == "code":
            ast.parse(re.sub(r"^[!%].*$", "pass", source, flags=re.MULTILINE))
