"""Losses from metrics.jsonl to a picture."""

import json
import sys

import pytest
from PIL import Image

from microdit_jax import plot
from microdit_jax.errors import UserError
from microdit_jax.run_checkpoint import write_run_metadata

LINES = [
    {"step": 0, "heldout": {"raw": {"right": 1.0}}},
    {"step": 5, "loss": 0.9},
    {"step": 10, "loss": None},
    {"step": 10, "heldout": {"raw": {"right": 0.8}, "ema": {"right": 0.7}}},
]


def write_run(folder):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    config = {"train": {"mask_ratio": 0.75}, "model": {"options": {"input_size": 8}}}
    write_run_metadata(folder, {"config": config})
    return folder


def test_series():
    assert plot.series(LINES) == {
        "train": [(5, 0.9)],
        "raw": [(0, 1.0), (10, 0.8)],
        "ema": [(10, 0.7)],
    }


def test_a_panel_for_each_run(tmp_path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    plot.draw(runs[:1], tmp_path / "one.png")
    plot.draw(runs, tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.width == 2 * one.width and two.height == one.height
        assert len(two.convert("RGB").getcolors(two.width * two.height)) > 100


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="give --runs"):
        plot.draw([], tmp_path / "x.png")
    with pytest.raises(UserError, match="expected a training run"):
        plot.draw([tmp_path], tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.draw([tmp_path], tmp_path / "x.png")
