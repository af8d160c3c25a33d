"""PNGs and runs of strangers choose no files: only what is released, or what a flag names too."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from support.hostile import ROOT, assert_refused, outcomes, run_hostile
from test_hostile_folders import DEEP, edit, instant_with

import microdit_jax
from microdit_jax import create, images
from microdit_jax.assets import hub, instant
from microdit_jax.errors import UserError
from microdit_jax.images.files import KEY

GOOD = {
    "model": "instant", "vae": None, "text_encoder": None, "ema": True, "dtype": None,
    "num_inference_steps": 2, "guidance_scale": 1.5, "seed": 1, "noise": "jax", "of": 1,
    "made_with": "", "prompt": "a dog", "index": 0,
}  # fmt: skip
SAMPLE = str(ROOT / "sample_main.py")


def png(path, settings):
    """Writes a PNG with settings; text is written as it is."""
    info = PngImagePlugin.PngInfo()
    text = settings if isinstance(settings, str) else json.dumps(settings)
    info.add_itxt(KEY, text)
    Image.new("RGB", (2, 2)).save(path, format="PNG", pnginfo=info)


STRANGE = {
    "model": {"model": "../stranger/run"},
    "absolute": {"model": "/etc"},
    "bucket": {"model": "gs://bucket/run"},
    "vae": {"vae": "somebody/vae"},
    "text encoder": {"text_encoder": "somebody/t5"},
    "openclip": {"text_encoder": "openclip:hf-hub:somebody/clip"},
    "table": {"text_encoder": "table:width=999999999998,tokens=4,seed=0"},
    "escapes": {"model": "\x1b[2J\nmodel loaded\u202e"},
    "shell": {"model": "x; rm -rf ~"},
    "known but local": {"model": "dit_4_channel_22M_real_only_data"},
    "long": {"model": "x" * 100_000},
    "index": {"index": -1},
    "index of text": {"index": "0"},
    "set": {"of": 2**40, "index": 2**39},
    "torch's set": {"of": 2**32, "index": 2**31, "noise": "torch_cpu"},
    "steps": {"num_inference_steps": 10**9},
    "guidance": {"guidance_scale": 1e300},
    "prompt": {"prompt": ["a"]},
}


def test_pngs_of_strangers(tmp_path):
    """As the command reads them; a few through the command itself, below."""
    (tmp_path / "dit_4_channel_22M_real_only_data").mkdir()
    for name, changed in STRANGE.items():
        png(tmp_path / f"{name}.png", GOOD | changed)
    png(tmp_path / "deep.png", DEEP)
    png(tmp_path / "surrogates.png", '{"prompt": "\\ud800"}')
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "gif.png", format="GIF")
    png(tmp_path / "good.png", GOOD)
    png(tmp_path / "released.png", GOOD | {"model": hub.REPOSITORY, "vae": None})
    png(tmp_path / "known.png", GOOD | {"vae": hub.SDXL_VAE, "text_encoder": hub.DFN5B_CLIP})
    files = sorted(path.name for path in tmp_path.glob("*.png"))
    results = dict(zip(files, outcomes("support.readers:read_png", files, tmp_path), strict=True))
    # Refused when it is sampled, as memory is another on each machine.
    good = {name for name, (status, _) in results.items() if status == 0}
    assert good == {"good.png", "known.png", "torch's set.png", "table.png"}
    for name, (status, line) in results.items():
        assert (name in good or status == 2) and line.isprintable() and len(line) < 900, name
    for name, flag in {
        "model": "add --model=../stranger/run", "vae": "add --vae=somebody/vae",
        "shell": "add --model='x; rm -rf ~'", "openclip": "add --text_encoder=openclip:hf",
        "released": f"--model={hub.REPOSITORY}", "escapes": r"\x1b[2J\nmodel loaded\u202e",
        "known but local": "add --model=dit_4_channel_22M_real_only_data",
    }.items():  # fmt: skip
        assert flag in results[f"{name}.png"][1], results[f"{name}.png"]


@pytest.mark.parametrize("name", ["vae", "torch's set", "table"])
def test_the_command_refuses(tmp_path, name):
    png(tmp_path / "x.png", GOOD | STRANGE[name])
    line = assert_refused(run_hostile([SAMPLE, "--again=x.png", "--out=out"], tmp_path))
    assert {
        "vae": "if you trust it, add",
        "table": "expected a width up to",
        "torch's set": "noise",
    }[name] in line
    assert not list(tmp_path.rglob("*/*.png"))


def test_a_flag_of_ones_own_is_enough(tmp_path):
    """And what is about to be loaded is said first."""
    shutil.copytree(instant.FOLDERS["instant"], tmp_path / "mine")
    png(tmp_path / "x.png", GOOD | {"model": "mine", "prompt": "a dog\x1b[2J"})
    arguments = [SAMPLE, "--again=x.png", "--out=out", "--dtype=float32"]
    assert "add --model=mine" in assert_refused(run_hostile(arguments, tmp_path))
    done = run_hostile([*arguments, "--model=mine"], tmp_path)
    assert done.returncode == 0, done.stderr
    first, *_ = done.stdout.splitlines()
    assert first == (
        r"x.png: image 0 of 1, a dog\x1b[2J; with model mine, vae its own, text_encoder its own; "
        "2 steps"
    )
    assert images.read_png(tmp_path / "out/images/0000_a-dog-2j.png").shape == (32, 32, 3)


RUNS = {
    "vae": ({"vae": "/home/somebody/vae"}, "add --vae=/home/somebody/vae"),
    "repository": ({"vae": "somebody/vae"}, "add --vae=somebody/vae"),
    "text encoder": ({"text_encoder": "somebody/t5"}, "add --text_encoder=somebody/t5"),
    "escapes": ({"vae": "\x1b[2J"}, "add --vae='\\x1b[2J'"),
    "both": (
        {"vae": "a/b", "text_encoder": "c/d"}, "if you trust it, add --vae=a/b --text_encoder=c/d",
    ),
}  # fmt: skip


def run_with(folder, data):
    """Makes the instant model a stranger's run, whose config names its towers."""
    shutil.copytree(instant.FOLDERS["instant"], folder)
    if "vae" in data:
        shutil.rmtree(folder / "vae")
        (folder / "vae").write_text("")  # no codec of its own
        edit(folder / "manifest.json", lambda m: [m.pop(n) for n in list(m) if "vae" in n])
        empty = [0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]
        edit(folder / "manifest.json", lambda m: m.update(vae=empty))
    instant_with(lambda contents: contents["config"]["data"].update(data))(folder)


def test_runs_of_strangers(tmp_path):
    for name, (data, _) in RUNS.items():
        run_with(tmp_path / name, data)
    results = outcomes("microdit_jax.create:load", list(RUNS), tmp_path)
    for (name, (_, words)), (status, line) in zip(RUNS.items(), results, strict=True):
        assert status == 2 and words in line and line.isprintable(), (name, status, line)


def test_a_run_with_towers_that_are_asked_for(tmp_path):
    run_with(tmp_path / "run", RUNS["repository"][0])
    codec = str(instant.FOLDERS["instant"] / "vae")
    pipe, _ = create.load(str(tmp_path / "run"), vae=codec)
    assert pipe.generate("a dog", num_inference_steps=1, seed=0).shape == (1, 32, 32, 3)
    run_with(tmp_path / "mine", {"vae": codec})
    with pytest.raises(UserError, match="add --vae="):
        microdit_jax.create_latent_diffusion(checkpoint=str(tmp_path / "mine"))
    pipe = microdit_jax.create_latent_diffusion(
        checkpoint=str(tmp_path / "mine"), vae_name=codec, dtype="float32"
    )
    assert np.isfinite(pipe.generate("a dog", num_inference_steps=1, seed=0)).all()
