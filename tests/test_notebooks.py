"""Every notebook's code runs from top to bottom, on a run of one step instead of the demo's."""

import ast
import json
import pathlib

import pytest
from PIL import Image
from tiny_config import get_config

from microdit_jax.train import train

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("notebook")
    config = get_config(str(folder / "data"))
    config.train.steps = 1
    train(config, folder / "run")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path in sorted(DOCS.glob("*.ipynb"))])
def test_runs_from_top_to_bottom(name, run, monkeypatch):
    monkeypatch.setenv("MODEL", str(run))
    cells = json.loads((DOCS / name).read_text())["cells"]
    names: dict = {}
    shown = 0
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        *body, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(body, []), name, "exec"), names)
        if isinstance(last, ast.Expr):  # what Jupyter shows below the cell
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
            assert isinstance(value, Image.Image) and len(value.getcolors(1 << 20)) > 16
            shown += 1
        else:
            exec(compile(ast.Module([last], []), name, "exec"), names)
    assert shown >= 3
