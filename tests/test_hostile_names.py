"""Names from outside in several commands: none forges a line or moves the cursor."""

import json
import re
import struct

import numpy as np
import pytest
from PIL import Image
from support.hostile import ROOT, assert_refused, run_hostile

from microdit_jax.checkpoints.run import write_run_metadata
from microdit_jax.commands import boundary
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.errors import UserError
from microdit_jax.xla import plot

# A title for the window, a cleared screen, a forged last line, a text that runs backwards.
NAME = "x\x1b]0;t\x07\x1b[2J\nerror: forged\r\x1b[1Aover\u202e\x9b"
VAE = ROOT / "microdit_jax" / "assets" / "instant" / "model" / "vae"
# A carriage return is read as a line end here.
FORGED = re.compile(r"^\s*(error: forged|.{0,4}over)", re.MULTILINE)


def assert_plain(done, told: str = "\\x1b") -> str:
    """Asserts that nothing in a command's output is acted upon but progress bars' own returns."""
    text = done.stdout + done.stderr
    assert not FORGED.search(text), text
    assert text.replace("\n", "").replace("\t", "").isprintable(), ascii(text)
    assert told in text
    return text


def test_paths_that_are_given(tmp_path):
    for command in (
        ["-m", "convert", f"--input={NAME}.pt", "--output=out"],
        ["-m", "microdit_jax.training.report", f"--runs={NAME}"],
        ["-m", "microdit_jax.xla.plot", f"--reports={NAME}"],
        ["-m", "microdit_jax.prepare.reformat", f"--input={NAME}", "--output=out", "--to=mds"],
    ):  # fmt: skip
        done = run_hostile(command, tmp_path)
        assert_refused(done)
        assert_plain(done)


@pytest.mark.slow
def test_tensors_of_checkpoints(tmp_path):
    write_torch(tmp_path / "a.pt", {NAME: np.zeros(3, np.float32)})
    header = json.dumps({NAME: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    safetensors = struct.pack("<Q", len(header)) + header + bytes(4)
    (tmp_path / "b.safetensors").write_bytes(safetensors)
    for file in ("a.pt", "b.safetensors"):
        command = ["-m", "convert", "--kind=vae", f"--input={file}", "--output=out"]
        done = run_hostile(command, tmp_path)
        assert_refused(done)
        assert_plain(done)


def test_runs(tmp_path):
    run = tmp_path / NAME.replace("/", "")
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": NAME}) + "\n")
    write_run_metadata(run, {"config": {}})
    done = run_hostile(["-m", "microdit_jax.training.report", f"--runs={run}"], tmp_path)
    assert_refused(done)
    assert_plain(done)


@pytest.mark.slow
def test_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{NAME.replace(chr(10), ' ')} {'word ' * 40}\n")
    flags = ["--prompts=prompts.txt", "--num_inference_steps=1", "--out=out"]
    done = run_hostile([str(ROOT / "sample_main.py"), *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokens of this prompt are cut" in assert_plain(done)


@pytest.mark.slow
def test_files_of_a_folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(NAME)
    (images / f"{NAME}.png").write_bytes(b"no image")
    (images / f"{NAME}.txt").write_text("a caption")
    done = run_hostile(
        ["-m", "microdit_jax.prepare", "--source=folder", f"--input={images}", "--output=out",
         "--resolutions=32", f"--vae={VAE}", "--text_encoder=table:width=8,tokens=8,seed=0"],
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_plain(done, told="not an image")


@pytest.mark.parametrize(
    "change",
    [
        {"memory": {}},
        {"seconds": []},
        {"seconds": {"matmuls": "\x1b[2J"}},
        {"chip": None, "topology": NAME},
        {"chip": None},
        {"config": ["\x1b"]},
    ],
)
def test_reports_of_the_lab(change, tmp_path):
    report = json.loads((ROOT / "docs" / "aot" / "res_256_pretrain_h100_8.json").read_text())
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**report, "topology": "a$x^$"}))
    plot.draw(plot.read([path]), tmp_path / "a.png")
    path.write_text(json.dumps(report | change))
    with pytest.raises(UserError, match="expected (a report of the lab|the report of a chip)"):
        plot.read([path])


def test_a_defects_traceback_is_escaped(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, line = boundary.describe(KeyError(NAME))
    (kept,) = (tmp_path / "microdit_jax" / "defects").iterdir()
    assert "\x1b" not in kept.read_text() and line.count(kept.name) == 1
