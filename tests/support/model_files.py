"""A tiny network, its text tower and its VAE as PyTorch files, as people have them."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny_model

from microdit_jax.assets import load
from microdit_jax.convert import clip_text, dit
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.encoders.clip_text import ClipText, ClipTextConfig
from support.golden_vae import load_vae

CLIP = ClipTextConfig(width=24, layers=1, heads=2, context_length=12)


@functools.cache
def tensors() -> dict[str, dict[str, np.ndarray]]:
    """State dicts of a network, a text tower and a VAE that fit together."""
    config = tiny_model().config
    shapes = load.abstract_params(config)
    leaves, tree = jax.tree.flatten(shapes)
    random = np.random.default_rng(0)
    normals = [0.1 * random.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    ids = jnp.zeros((1, 12), jnp.int32)
    tower = jax.jit(ClipText(CLIP).init)(jax.random.key(0), ids)["params"]
    return {
        "dit": dit.to_torch(tree.unflatten(normals), config),
        "clip_text": clip_text.to_torch(jax.tree.map(np.asarray, tower), CLIP),
        "vae": load_vae("vae_small").tensors,
    }


def write_dit(path: pathlib.Path, state_dict: dict[str, np.ndarray]) -> None:
    """Writes the network's file as python -m convert --to=torch does, with its config."""
    note = {"kind": "dit", "config": dataclasses.asdict(tiny_model().config)}
    write_torch(path, state_dict, notes={"extra/microdit_jax": json.dumps(note).encode()})


def write_files(folder: pathlib.Path) -> None:
    """Writes dit.pt, clip/open_clip_pytorch_model.bin and vae/."""
    write_dit(folder / "dit.pt", tensors()["dit"])
    for name in ("clip", "vae"):
        (folder / name).mkdir()
    write_torch(folder / "clip" / "open_clip_pytorch_model.bin", tensors()["clip_text"])
    text = {"context_length": 12, "vocab_size": CLIP.vocab_size}
    text |= {"width": 24, "heads": 2, "layers": 1}
    model = {"model_cfg": {"embed_dim": 24, "quick_gelu": True, "text_cfg": text}}
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(model))
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", tensors()["vae"])
    (folder / "vae" / "config.json").write_text(json.dumps(load_vae("vae_small").config_json))
