"""The model that comes with the package: whole, small, what its run was, and quick to draw."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from support.tiny_config import get_config

import microdit_jax
from microdit_jax import create, files
from microdit_jax import images as pictures
from microdit_jax.assets import instant, load
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.checkpoints.weights import load_run_params
from microdit_jax.convert.dit import config_from_dict
from microdit_jax.convert.formats.safetensors_file import read_safetensors
from microdit_jax.data import twemoji
from microdit_jax.errors import UserError
from microdit_jax.train import train
from microdit_jax.trees import flatten
from tools.ship_instant import MOST_BYTES, chain, ship

ROOT = pathlib.Path(__file__).parent.parent
OPTIONS = {"num_inference_steps": 6, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A tiny run of six steps, and the folder made of it."""
    folder = tmp_path_factory.mktemp("shipped")
    config = get_config(str(folder / "data"))
    config.train.steps = 6
    train(config, folder / "run")
    ship(folder / "run", folder / "model", command="a command")
    return folder


# ------------------------------------------------------------------ what ships
@pytest.mark.parametrize("name, most_ratio", [("instant", 0.6), ("instant2", 0.85)])
def test_it_ships_whole_and_small(name, most_ratio):
    folder = instant.FOLDERS[name]
    shipped_files = folder.rglob("*")
    assert sum(path.stat().st_size for path in shipped_files if path.is_file()) <= MOST_BYTES
    assert not files.damage(folder, files.read_json(folder / "manifest.json"))
    listed = files.read_json(folder / "manifest.json")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")}
    assert names == {*listed, "manifest.json"}
    arrays, _ = read_safetensors(folder / instant.WEIGHTS)
    assert {array.dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    card = (folder / "README.md").read_text()
    losses = [line for line in card.splitlines() if "held-out EDM loss" in line]
    ratio = float(losses[0].split(": ")[1].split()[0])
    assert ratio <= most_ratio and twemoji.ATTRIBUTION in card
    config = read_run_metadata(folder)["config"]
    assert config["train"]["mask_ratio"] == 0 and config["data"]["resolution"] == 32


def test_it_draws_what_it_was_asked_for():
    """Captions come out nearer to their own pictures than to one another's.

    The last was kept out of its training.
    """
    captions = ["hot pepper", "red apple", "crying cat", "penguin", "blue heart"]
    captions += [f"woman mechanic {tone} skin tone" for tone in ("light", "dark")]
    known = {picture.caption: picture for picture in twemoji.list_images()}
    real = twemoji.read_images([known[caption] for caption in captions], 32) / 2 + 0.5
    pipe = microdit_jax.create_latent_diffusion(checkpoint="instant", dtype="float32")
    images = pipe.generate(captions, seed=1, **OPTIONS | {"num_inference_steps": 12})
    assert images.shape == (7, 32, 32, 3)
    distance = np.mean((images[:, None] - real[None]) ** 2, axis=(2, 3, 4))
    assert distance.argmin(axis=1).tolist() == list(range(7)), distance
    again = pipe.generate(captions[:1], seed=1, **OPTIONS)
    np.testing.assert_array_equal(again, pipe.generate(captions[:1], seed=1, **OPTIONS))
    assert np.abs(again - pipe.generate(captions[:1], seed=2, **OPTIONS)).max() > 0.1


@pytest.mark.slow
def test_the_command_needs_no_model_no_network_and_no_home(tmp_path):
    command = [sys.executable, str(ROOT / "sample_main.py"), "--prompt=hot pepper"]
    closed = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(
        [*command, "--num_inference_steps=6"],
        cwd=tmp_path,
        env=os.environ | closed | {"HOME": str(tmp_path / "home"), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and "the instant model" in result.stdout, result.stderr
    (path,) = (tmp_path / "out" / "images").iterdir()
    settings = pictures.read_settings(path)
    assert (settings["model"], settings["guidance_scale"]) == ("instant", 3.0)


# ------------------------------------------------------------------ how it is made and read
def test_the_weights_are_the_runs_average_in_bfloat16(shipped):
    config = config_from_dict(read_run_metadata(shipped / "run")["dit"])
    abstract = load.abstract_params(config)
    average, step = load_run_params(shipped / "run", abstract, ema=True)
    model = load.load_model(str(shipped / "model"))
    assert step == 6 and flatten(model.params).keys() == flatten(average).keys()
    for found, expected in zip(
        jax.tree.leaves(model.params), jax.tree.leaves(average), strict=True
    ):
        assert found.dtype == np.float32
        rounded = np.asarray(expected).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found, rounded)
    run = load.load_model(str(shipped / "run"))
    assert (model.config, model.edm, model.text_encoder) == (run.config, run.edm, run.text_encoder)
    captions, latents = create.heldout_images(model, 5)
    assert captions == create.heldout_images(run, 5)[0] and latents.shape == (5, 8, 8, 8)


def test_a_shipped_folder_is_replaced_and_nothing_else_is(shipped, tmp_path):
    out = tmp_path / "model"
    ship(shipped / "run", out, command="one")
    ship(shipped / "run", out, command="two")
    assert "`two`" in (out / "README.md").read_text() and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(UserError, match="other files; move them"):
        ship(shipped / "run", tmp_path / "other", command="")
    assert [stage.updates for stage in chain(shipped / "run")] == [6]


def test_an_average_of_another_length_ships_from_snapshots(shipped, tmp_path):
    run = shipped / "run"
    ship(run, tmp_path / "model", command="c", ema_length=0.1)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "moving average of length 0.1 at step 6" in card and "the run's own average" in card
    abstract = load.abstract_params(config_from_dict(read_run_metadata(run)["dit"]))
    average, _ = load_run_params(run, abstract, ema=True, ema_length=0.1)
    own, _ = load_run_params(run, abstract, ema=True)
    found = flatten(load.load_model(str(tmp_path / "model")).params)
    rounded = flatten(average)
    for path, array in found.items():
        expected = np.asarray(rounded[path]).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(array, expected)
    assert any(not np.array_equal(found[path], leaf) for path, leaf in flatten(own).items())
    with pytest.raises(UserError, match="ema_length"):
        ship(run, tmp_path / "other", command="c", ema_length=0.9)


def cut(folder):
    path = folder / instant.WEIGHTS
    path.write_bytes(path.read_bytes()[:-2])


def flip(folder):
    path = folder / instant.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def widen(folder):
    metadata = json.loads((folder / "config.json").read_text())
    metadata["dit"]["dim"] = 24
    (folder / "config.json").write_text(json.dumps(metadata))
    manifest = files.checksums(folder)
    del manifest["manifest.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, r"safetensors \(\d+ bytes instead of \d+\); install"),
        (flip, r"safetensors \(contents changed\); install"),
        (widen, r"found others \(\d+ differ, the first is blocks_0/"),
    ],
)
def test_damage_is_found(shipped, tmp_path, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(shipped / "model", folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        load.load_model(str(folder))


def test_raw_weights_are_not_there(shipped):
    with pytest.raises(UserError, match="holds nothing else.*leave out --noema"):
        load.load_model(str(shipped / "model"), ema=False)
