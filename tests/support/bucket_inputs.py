"""Small inputs of every command, which docs/scaling.md's table of paths is tried with."""

import json
import pathlib

import numpy as np
from conftest import load_golden
from PIL import Image
from test_xla_aot import full_report

from microdit_jax.convert import clip
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.encoders.clip import ClipConfig
from microdit_jax.encoders.clip_image import ClipImageConfig
from microdit_jax.encoders.clip_text import ClipTextConfig
from microdit_jax.xla.aot import table
from support.inception import NARROW, synthetic_tensors
from support.synthetic import synthetic_state_dict

GENEVAL = [{"tag": "colors", "include": [], "prompt": "a red cat"}]


def write(folder: pathlib.Path) -> None:
    """Writes all of them: texts, images, checkpoints, recordings, reports."""
    folder.mkdir()
    (folder / "prompts.txt").write_text("an apple\na dog\n")
    (folder / "geneval.jsonl").write_text("".join(json.dumps(x) + "\n" for x in GENEVAL))
    _write_images(folder)
    write_torch(folder / "inception.pth", synthetic_tensors(NARROW))
    _write_clip(folder / "clip")
    _write_recording(folder)
    table.write(full_report(), folder / "aot.json")


def geneval_results(folder: pathlib.Path) -> None:
    """Writes what GenEval's detector would say about the images of `GENEVAL`."""
    line = {"tag": "colors", "correct": True, "metadata": json.dumps(GENEVAL[0])}
    (folder / "results.jsonl").write_text(4 * (json.dumps(line) + "\n"))


def _write_images(folder: pathlib.Path) -> None:
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(6):
        pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "caption": f"image number {i}"} for i in range(6)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "image.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(folder / "mask.png")


def _write_clip(folder: pathlib.Path) -> None:
    """Writes a CLIP of few weights that takes all tokens."""
    text = ClipTextConfig(width=16, layers=1, heads=2)
    image = ClipImageConfig(width=32, layers=1, heads=4, image_size=32, patch_size=8)
    config = ClipConfig(text, image, 24)
    folder.mkdir()
    names = {e.torch_name: e.torch_shape for e in clip.rename_table(config, "openclip")}
    write_safetensors(folder / "open_clip_model.safetensors", synthetic_state_dict(names, 3))
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 8}
    words = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    about = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": words}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": about}))


def _write_recording(folder: pathlib.Path) -> None:
    """Writes a checkpoint of the reference's, its config, and what the reference computed."""
    golden = load_golden("dit_small")
    keys = [*golden.keys("activation/"), "x", "t", "y", "sample"]
    write_torch(
        folder / "dit.pt",
        {k.removeprefix("state_dict/"): golden.arrays[k] for k in golden.keys("state_dict/")},
    )
    np.savez(folder / "recorded.npz", **{key: golden.arrays[key] for key in keys})
    (folder / "dit.json").write_text(str(golden.arrays["config"]))
