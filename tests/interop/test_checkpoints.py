"""Checkpoints by torch, the safetensors library, and Composer with the reference's own network."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from support.convert_command import run

from convert.reference import reference_arguments
from interop.conftest import needs, write
from microdit_jax import create
from microdit_jax.checkpoints.model_folder import read_metadata
from microdit_jax.convert.formats.torch_file import read_torch
from microdit_jax.convert.inputs import find_input, read_tensors
from microdit_jax.convert.kinds import get_kind

COMPOSER = ("torch", "composer", "diffusers", "open_clip", "easydict")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write("checkpoints.py", folder, packages=("torch", "safetensors"))
    return folder


@pytest.mark.parametrize("name", ["new.pt", "legacy.pt", "a.safetensors", "distcp", "distcp2"])
def test_every_format_has_the_same_values(files, name):
    """distcp2 is by two processes, which had parts of four of the tensors."""
    found = read_tensors(find_input(files / name, get_kind("dit")).files, None).tensors
    expected = np.load(files / "expected.npz")
    assert len(found) == (4 if name == "distcp2" else len(expected.files))
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor.astype(np.float32), expected[key])


def test_scaled_float8(files):
    found = read_tensors((files / "scaled.safetensors",), None).tensors
    assert set(found) == {"layer.weight"}
    np.testing.assert_array_equal(found["layer.weight"], np.load(files / "scaled.npy"))


def same(found: dict, expected: dict) -> bool:
    bare = {name.replace("_orig_mod.", ""): tensor for name, tensor in expected.items()}
    equal = [np.array_equal(found[name], tensor) for name, tensor in bare.items()]
    return set(found) == set(bare) and all(equal)


def passes_parity(checkout, path, *flags) -> None:
    """The reference, with the same weights, computes in torch what ours does: float32 to 2e-5."""
    report = pathlib.Path(f"{path}.parity.json")
    python = needs("torch", "microdit_jax")
    done = subprocess.run(
        [python, "-m", "convert.parity", f"--input={path}", f"--reference={checkout}",
         f"--json={report}", "--batch=2", *flags],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(report.read_text())["rows"]
    assert len(rows) > 10 and rows[-1]["module"] == "sample"
    for row in rows:
        assert row["float32"]["relative_l2"] < 2e-5, row
        assert row["float32"].get("routing_differs", 0) == 0, row


@pytest.mark.parametrize("which", ["plain", "compile", "ema"])
def test_two_batches_of_the_reference_under_composer(tmp_path, checkout, which):
    """Converted exactly, and back; the config that was given once is kept; all pass parity."""
    folder = tmp_path / "run"
    folder.mkdir()
    write("composer_run.py", which, checkout, folder, packages=COMPOSER)
    weights = ["--weights=ema"] if which == "ema" else []
    expected = read_torch(folder / f"expected{'_ema' * bool(weights)}.pt")
    theirs = folder / "latest-rank0.pt"
    config = f"--config={folder / 'config.json'}"
    run(f"--input={theirs}", f"--output={tmp_path / 'model'}", config, *weights)
    run("--to=torch", f"--input={tmp_path / 'model'}", f"--output={tmp_path / 'back.pt'}")
    back = read_torch(tmp_path / "back.pt")
    constants = {n: t for n, t in back.items() if n in ("pos_embed", "mask_token")}
    assert same(back, constants | expected)
    run(f"--input={tmp_path / 'back.pt'}", f"--output={tmp_path / 'again'}")
    assert read_metadata(tmp_path / "again")["dit"] == read_metadata(tmp_path / "model")["dit"]
    raw = read_tensors((theirs,), "dit").tensors
    assert same(raw, read_torch(folder / "expected.pt"))
    passes_parity(checkout, theirs, config, *weights)
    passes_parity(checkout, tmp_path / "back.pt")


def demo_run(folder: pathlib.Path) -> str:
    """Trains the demo's two stages for a few steps each, with an average of the weights."""
    flags = []
    for stage, steps in (("pretrain", 4), ("finetune", 8)):
        shorter = (f"train.steps={steps}", "train.batch_size=16", "ema.start_step=1")
        shorter += ("eval.num_images=16", "eval.batch_size=16", "eval.draws=1")
        flags += [f"--config.{stage}.{given}" for given in shorter]
    subprocess.run(
        [sys.executable, ROOT / "train_main.py", f"--config={ROOT / 'configs/demo.py'}",
         f"--workdir={folder}", *flags],
        cwd=folder, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}, check=True,
    )  # fmt: skip
    return str(folder / "finetune")


@pytest.mark.parametrize("name", ["instant", "demo"])
def test_the_reference_samples_the_same_from_our_file(tmp_path, checkout, name):
    """Written as .pt, in the reference's own classes and sampler.

    instant is the model in the package; demo is a run of a few steps, or the one that $DEMO_RUN
    names.
    """
    needs(*COMPOSER)
    if name == "demo":
        name = os.environ.get("DEMO_RUN") or demo_run(tmp_path)
    run("--to=torch", f"--input={name}", f"--output={tmp_path / 'dit.pt'}")
    pipe, model = create.load(name, dtype="float32")
    config = model.config
    (tmp_path / "config.json").write_text(json.dumps(reference_arguments(config)))
    random = np.random.default_rng(0)
    side, channels = config.input_size, config.in_channels
    noise = random.standard_normal((2, side, side, channels), np.float32)
    captions = random.standard_normal((2, 24, config.caption_channels), np.float32)
    np.savez(
        tmp_path / "inputs.npz", noise=noise.transpose(0, 3, 1, 2), captions=captions[:, None],
        steps=8, guidance=3.0,
    )  # fmt: skip
    write("reference_sample.py", checkout, tmp_path, packages=COMPOSER)
    expected = np.load(tmp_path / "sample.npy").transpose(0, 2, 3, 1)
    found = pipe.denoise(captions, noise, guidance_scale=3.0, num_inference_steps=8, batch_size=2)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 1e-5, error
