"""Towers that diffusers, transformers and OpenCLIP wrote compute here what they computed there."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.convert_command import run

from interop.conftest import write
from microdit_jax.convert import bert, clip, clip_text, t5, vae
from microdit_jax.convert.arguments import open_folder

PACKAGES = ("torch", "diffusers", "transformers")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    write("towers.py", folder, packages=PACKAGES)
    return folder


def near(found, expected) -> bool:
    error = np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)
    return bool(error < 2e-5)


def loaded(module, folder) -> tuple:
    """The config of a model folder, and its parameters as a network takes them."""
    found = open_folder(folder, module.KIND.name)
    return module.config_from_dict(found.config), {"params": found.params}


@pytest.mark.parametrize("name", ["vae", "vae_sd3", "vae_mean", "vae_variant"])
def test_autoencoders_of_diffusers(files, tmp_path, name):
    run("--kind=vae", f"--input={files / name}", f"--output={tmp_path / 'model'}")
    codec = vae.load_codec(tmp_path / "model")
    golden = {k: np.moveaxis(v, 1, -1) for k, v in np.load(files / f"{name}.npz").items()}
    assert near(codec.encode(golden["image"]), golden["latent"])
    assert near(codec.decode(golden["latent"]), np.clip(golden["decoded"], -1, 1))


@pytest.mark.parametrize("name", ["clip_text", "clip_text_shards", "clip_text_variant"])
def test_text_towers_of_transformers(files, tmp_path, name):
    run("--kind=clip_text", f"--input={files / name}", f"--output={tmp_path / 'model'}")
    golden = np.load(files / f"{name}.npz")
    config, params = loaded(clip_text, tmp_path / "model")
    found = clip_text.ClipText(config).apply(params, jnp.asarray(golden["ids"], jnp.int32))
    assert near(found, golden["tokens"])


def test_a_whole_clip_of_transformers(files, tmp_path):
    run("--kind=clip", f"--input={files / 'clip'}", f"--output={tmp_path / 'model'}")
    golden = np.load(files / "clip.npz")
    config, params = loaded(clip, tmp_path / "model")
    pixels = jnp.asarray(golden["pixels"].transpose(0, 2, 3, 1))
    network = clip.Clip(config)
    text = network.apply(params, jnp.asarray(golden["ids"], jnp.int32), method="encode_text")
    image = network.apply(params, pixels, method="encode_image")
    for found, name in ((text, "text"), (image, "image")):
        found = np.asarray(found) / np.linalg.norm(found, axis=-1, keepdims=True)
        assert near(found, golden[name])


def test_a_t5_of_transformers(files, tmp_path):
    run("--kind=t5", f"--input={files / 't5'}", f"--output={tmp_path / 'model'}")
    golden = np.load(files / "t5.npz")
    config, params = loaded(t5, tmp_path / "model")
    mask = golden["mask"].astype(bool)
    found = t5.T5(config).apply(params, jnp.asarray(golden["ids"], jnp.int32), jnp.asarray(mask))
    assert near(np.asarray(found)[mask], golden["tokens"][mask])


def test_a_bert_of_transformers(files, tmp_path):
    run("--kind=bert", f"--input={files / 'bert'}", f"--output={tmp_path / 'model'}")
    golden = np.load(files / "bert.npz")
    encoder = bert.load_encoder(tmp_path / "model")
    mask = golden["mask"].astype(bool)
    found = encoder.encode(golden["ids"].astype(np.int32), mask)
    assert near(found[mask], golden["tokens"][mask])


@pytest.fixture(scope="module")
def open_clip_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    write("open_clip_model.py", folder, packages=("torch", "open_clip", "safetensors"))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_clip_of_open_clip(open_clip_files, tmp_path, kind):
    """Both towers, and the text tower alone; its tokens are those of OpenCLIP's tokenizer."""
    golden, folder = np.load(open_clip_files / "expected.npz"), open_clip_files / kind
    run("--kind=clip", f"--input={folder}", f"--output={tmp_path / 'clip'}")
    config, params = loaded(clip, tmp_path / "clip")
    encoder = clip.ClipEncoder("open_clip", config, params["params"])
    pixels = jnp.asarray(golden["pixels"].transpose(0, 2, 3, 1))
    images = np.asarray(clip.Clip(config).apply(params, pixels, method="encode_image"))
    texts = encoder.encode_texts(list(map(str, golden["texts"])))
    for found, name in ((texts, "text"), (images, "image")):
        assert near(found / np.linalg.norm(found, axis=-1, keepdims=True), golden[name])
    run("--kind=clip_text", f"--input={folder}", f"--output={tmp_path / 'text'}")
    config, params = loaded(clip_text, tmp_path / "text")
    ids = jnp.asarray(golden["ids"], jnp.int32)
    assert near(clip_text.ClipText(config).apply(params, ids), golden["tokens"])
