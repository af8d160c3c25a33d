"""The command: prompts to PNGs, the same again, one made again from its settings, bad input."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from support.model_files import tensors, write_dit

from microdit_jax import images
from microdit_jax.assets import load
from microdit_jax.convert import t5
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.encoders.t5 import T5, T5Config

ROOT = pathlib.Path(__file__).parent.parent
PROMPTS = ["an apple", "a dog", "the sun"]


def sample(folder, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "sample_main.py", *flags],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")} | environment,
        capture_output=True,
        text=True,
    )


def model(folder) -> list[str]:
    return [
        f"--model={folder / 'dit.pt'}",
        f"--vae={folder / 'vae'}",
        f"--text_encoder={folder / 'clip'}",
        "--num_inference_steps=2",
    ]


@pytest.mark.slow
def test_sampled_resumed_and_sampled_again(files):
    (files / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    out = files / "out"
    command = [
        *model(files),
        f"--prompts={files / 'prompts.txt'}",
        f"--out={out}",
        "--batch_size=2",
    ]
    first = sample(files, *command, "--noise=torch_cpu")
    assert first.returncode == 0, first.stderr
    assert "3 images in" in first.stdout and "images/s" in first.stdout
    names = sorted(path.name for path in (out / "images").iterdir())
    assert names == ["0000_an-apple.png", "0001_a-dog.png", "0002_the-sun.png"]
    settings = images.read_settings(out / "images" / names[1])
    assert (settings["prompt"], settings["index"], settings["of"]) == ("a dog", 1, 3)

    # The same command again samples the missing image alone, and compiles nothing.
    before = {name: (out / "images" / name).read_bytes() for name in names}
    (out / "images" / names[2]).unlink()
    again = sample(files, *command, "--noise=torch_cpu")
    assert "2 of 3 images are there already" in again.stdout
    assert "converting" not in again.stdout
    assert {name: (out / "images" / name).read_bytes() for name in names} == before

    # One image from its own settings. A PNG loads no path that its owner does not name too.
    refused = sample(files, f"--again={out / 'images' / names[1]}", f"--out={files / 'again'}")
    assert refused.returncode == 2 and not (files / "again").exists()
    towers = model(files)[:3]
    assert f"if you trust it, add {' '.join(towers)}" in refused.stderr
    again = [f"--again={out / 'images' / names[1]}", *towers]
    made_again = sample(files, *again, f"--out={files / 'again'}")
    assert made_again.returncode == 0, made_again.stderr
    assert f"image 1 of 3, a dog; with model {files / 'dit.pt'}, vae {files}" in made_again.stdout
    found = images.read_png(files / "again" / "images" / names[1])
    expected = images.read_png(out / "images" / names[1])
    np.testing.assert_allclose(found, expected, atol=1.5 / 255)

    # A flag that is given goes before the PNG's settings.
    other = sample(files, *again, "--seed=9", f"--out={files / 'o'}")
    assert other.returncode == 0, other.stderr
    changed = images.read_settings(files / "o" / "images" / names[1])
    assert changed == settings | {"seed": 9}
    assert np.abs(images.read_png(files / "o" / "images" / names[1]) - expected).max() > 0.01

    # And once more, with all that it needs in the caches.
    last = sample(files, *again, f"--out={files / 'last'}")
    assert "; 0 programs compiled" in last.stdout, last.stdout


@pytest.mark.slow
def test_an_edited_and_autoguided_image_is_made_again_to_the_bit(files):
    """A WebP made from an image and a mask, with a weaker network, a solver and a strength.

    The file brings the editing and the sampler back; the networks' paths must be trusted.
    """
    scaled = {"pos_embed": 1.0}  # which no file may change
    dit = tensors()["dit"].items()
    write_dit(files / "weaker.pt", {name: scaled.get(name, 0.8) * value for name, value in dit})
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(values).save(files / "given.png")
    upper = np.zeros((40, 40), np.uint8)
    upper[:20] = 255
    Image.fromarray(upper).save(files / "mask.png")
    towers = [*model(files)[:3], f"--weaker={files / 'weaker.pt'}"]
    first = sample(
        files, *towers, "--guidance=auto", "--guidance_scale=2", "--solver=ab2", "--schedule=log",
        "--num_inference_steps=4", f"--image={files / 'given.png'}", f"--mask={files / 'mask.png'}",
        "--strength=0.75", "--seed=5", "--num_images=2", "--batch_size=1", "--format=webp",
        "--prompt=a dog", f"--out={files / 'out'}",
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    path = files / "out" / "images" / "0001_a-dog.webp"
    settings = images.read_settings(path)
    assert settings["weaker"] == str(files / "weaker.pt") and settings["strength"] == 0.75
    assert settings["network_passes"] == 6 and settings["mask"] == str(files / "mask.png")

    made = [f"--again={path}", "--format=webp", f"--out={files / 'again'}"]
    refused = sample(files, *made, *towers[:3])
    assert refused.returncode == 2 and f"add {towers[3]}" in refused.stderr, refused.stderr
    again = sample(files, *made, *towers)
    assert again.returncode == 0, again.stderr
    assert (files / "again" / "images" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompts=nope.txt"], "expected a text file at nope.txt"),
        (["--prompt=a", "--heldout=2"], "give one of --prompt, --prompts and --heldout"),
        (["--prompt=a", "--vae=table:x"], "of the Hugging Face repository table:x"),
        (["--again=pyproject.toml"], "expected a PNG made by sample_main.py"),
        (["--prompt= "], "expected a prompt, found an empty one"),
        (["--prompt=a", "--solver=ddim"], "solver must be one of heun, "),
        (["--prompt=a", "--solver=ab3", "--num_inference_steps=1"], "must be at least 3"),
        (["--prompt=a", "--guidance_scale=-5"], "guidance_scale must not be negative, found -5"),
        (["--prompt=a", "--guidance=apg", "--apg=a,b,c"], "--apg takes numbers divided by commas"),
        (["--prompt=a", "--guidance=interval", "--guidance_interval=1"], "takes 2 numbers"),
        (["--prompt=a", "--guidance_scale=nan"], "--guidance_scale must be a finite number"),
    ],
)
def test_bad_input(files, flags, message):
    result = sample(files, *model(files), *flags, HF_HUB_OFFLINE="1")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_t5_without_its_tokenizer(files):
    config = T5Config(width=24, layers=1, heads=2, head_dim=8, ffn=32, vocab_size=96)
    ids = np.ones((1, 4), np.int32)
    params = jax.jit(T5(config).init)(jax.random.key(0), ids, ids == 1)["params"]
    tensors = t5.to_torch(jax.tree.map(np.asarray, params), config)
    (files / "t5").mkdir()
    (files / "t5" / "config.json").write_text(json.dumps(t5.config_json(config)))
    write_safetensors(files / "t5" / "model.safetensors", tensors)
    tower = load.converted("t5", files / "t5")
    result = sample(files, *model(files), f"--text_encoder={tower}", "--prompt=a")
    assert result.returncode == 2, result.stderr
    assert "expected a tokenizer with" in result.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_warnings_and_a_cache_that_cannot_be_written(files):
    long = "apple " * 30
    result = sample(files, *model(files), f"--prompt={long}", f"--out={files / 'out'}")
    assert "warning: the last 20 tokens of this prompt are cut" in result.stdout, result.stderr
    (files / "file").write_text("")
    result = sample(files, *model(files), "--prompt=a", XDG_CACHE_HOME=str(files / "file"))
    assert result.returncode == 2
    assert "choose a place you may write to" in result.stderr.strip().splitlines()[-1]
