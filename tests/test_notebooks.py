"""Every notebook's code runs from top to bottom, on a run of one step instead of the demo's."""

import pathlib

import pytest
from tiny_config import get_config

from microdit_jax.train import train
from tools.notebook_page import read_cells, run_cell

DOCS = pathlib.Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("notebook")
    config = get_config(str(folder / "data"))
    config.train.steps = 1
    train(config, folder / "run")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_from_top_to_bottom(path, run, monkeypatch):
    monkeypatch.setenv("MODEL", str(run))
    names: dict = {}
    ran = [
        run_cell(source, path.name, names) for kind, source in read_cells(path) if kind == "code"
    ]
    pictures = [cell.picture for cell in ran if cell.picture]
    assert len(pictures) >= 3
    for picture in pictures:
        assert len(picture.getcolors(1 << 20)) > 16


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_its_page_shows_the_same_code(path):
    page = path.with_suffix(".md").read_text()
    for _, source in read_cells(path):
        assert source in page, f"python tools/notebook_page.py: {source[:60]} is not there"
