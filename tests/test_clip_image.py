import dataclasses
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, relative_l2
from support.convert_command import fails, run
from support.small_clip import openclip_config, small_config, small_tensors

from microdit_jax.checkpoints.model_folder import read_metadata
from microdit_jax.convert import clip
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.encoders.clip import ClipConfig, ClipEncoder
from microdit_jax.encoders.clip_image import ClipImageConfig, to_pixels
from microdit_jax.encoders.clip_text import ClipTextConfig
from microdit_jax.errors import UserError

FULL_SIZE = {  # width, layers, heads, patch of either tower, as OpenCLIP has them
    "ViT-B-32": ClipConfig(
        ClipTextConfig(width=512, layers=12, heads=8, activation="gelu"),
        ClipImageConfig(width=768, layers=12, heads=12, patch_size=32, activation="gelu"),
        512,
    ),
    "ViT-L-14": ClipConfig(
        ClipTextConfig(width=768, layers=12, heads=12, activation="gelu"),
        ClipImageConfig(width=1024, layers=24, heads=16, activation="gelu"),
        768,
    ),
    "ViT-H-14": ClipConfig(ClipTextConfig(), ClipImageConfig(), 1024),
}


@pytest.fixture(scope="module")
def golden():
    """What open_clip 3.3.0 computes with synthetic weights."""
    with np.load(GOLDEN / "clip_small.npz") as file:
        return {key: file[key] for key in file.files}


def inputs(side: int, n: int, vocab: int):
    rng = np.random.default_rng(5)
    pixels = rng.standard_normal((n, side, side, 3)).astype(np.float32)
    ids = np.zeros((n, 77), np.int32)
    for i, length in enumerate(rng.integers(2, 77, n)):
        ids[i, :length] = rng.integers(1, vocab - 2, length)
        ids[i, 0], ids[i, length - 1] = vocab - 2, vocab - 1
    return pixels, ids


def embed(encoder: ClipEncoder, pixels, ids):
    image = encoder._image(encoder.params, jnp.asarray(pixels))
    return np.asarray(image), np.asarray(encoder._text(encoder.params, jnp.asarray(ids)))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_both_towers_equal_open_clip(golden, activation):
    tensors = small_tensors()
    config = clip.infer_config(tensors, openclip_config(golden, activation))
    assert config == small_config(activation)
    encoder = ClipEncoder("golden", config, clip.from_torch(tensors, config))
    image, text = embed(encoder, *inputs(32, 3, 64))
    assert relative_l2(image, golden[f"{activation}/image"]) < 2e-5
    assert relative_l2(text, golden[f"{activation}/text"]) < 2e-5
    other = {"quick_gelu": "gelu", "gelu": "quick_gelu"}[activation]
    assert relative_l2(image, golden[f"{other}/image"]) > 1e-3


@pytest.mark.parametrize("arch", FULL_SIZE)
def test_full_size_tensors_are_open_clips_own(golden, arch):
    expected, config = json.loads(str(golden["layouts"]))[arch], FULL_SIZE[arch]
    table = clip.rename_table(config, "openclip")
    lines = sorted(f"{entry.torch_name} {entry.torch_shape}" for entry in table)
    assert len(lines) == expected["tensors"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == expected["sha256"]
    assert sum(math.prod(entry.torch_shape) for entry in table) == expected["parameters"]


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_pixels_equal_open_clips(golden, mode):
    config = dataclasses.replace(small_config().image, resize=mode)
    for i in range(4):
        found = to_pixels([golden[f"picture{i}"]], config)[0]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, golden[f"{mode}{i}"], atol=1e-6)


def test_transformers_layout_holds_the_same_network():
    config = small_config()
    params = clip.from_torch(small_tensors(), config)
    theirs = clip.to_torch(params, config, layout="transformers")
    assert theirs["visual_projection.weight"].shape == (24, 32)
    assert "vision_model.pre_layrnorm.weight" in theirs
    assert "vision_model.encoder.layers.1.self_attn.q_proj.weight" in theirs
    older = theirs | {
        "vision_model.embeddings.position_ids": np.arange(17)[None],
        "logit_scale": theirs["logit_scale"].reshape(1),
    }
    fields = {
        "text_config": {"hidden_act": "quick_gelu", "num_attention_heads": 2},
        "vision_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 128, "image_size": 32, "patch_size": 8,
        },
    }  # fmt: skip
    found = clip.infer_config(older, fields)
    assert found.image == config.image
    fields["vision_config"]["layer_norm_eps"] = 1e-6
    assert clip.infer_config(older, fields).image.norm_eps == 1e-6
    assert dataclasses.replace(found.text, padding=0) == config.text
    back = clip.from_torch(older, found)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_batches_and_devices_do_not_matter():
    config = small_config()
    params = clip.from_torch(small_tensors(), config)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (24, 30, 3)).astype(np.uint8) for _ in range(5)]
    one = ClipEncoder("", config, params, batch=2).encode_images(pictures)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    eight = ClipEncoder("", config, spread, batch=2)
    np.testing.assert_allclose(eight.encode_images(pictures), one, rtol=1e-5, atol=1e-6)
    assert eight.encode_images([]).shape == (0, 24)
    assert np.abs(one[0] - one[1]).max() > 1e-3


def test_the_command(tmp_path, golden, capsys):
    folder, model = tmp_path / "clip", tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "open_clip_model.safetensors", small_tensors())
    assert "found neither" in fails(capsys, "--kind=clip", f"--input={folder}", f"--output={model}")
    about = openclip_config(golden, "quick_gelu")
    prepare = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"}
    about["preprocess_cfg"] = prepare
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    run("--kind=clip", f"--input={folder}", f"--output={model}")
    assert "images of 32 px in patches of 8" in capsys.readouterr().out
    stored = clip.config_from_dict(read_metadata(model)["clip"])
    assert stored.image.mean == (0.5, 0.5, 0.5) and stored.image.std == (0.25, 0.25, 0.25)
    assert stored.image.resize == "squash"
    encoder = clip.load_encoder(model)
    assert encoder.name.startswith("clip:weights=") and encoder.config == stored
    back = tmp_path / "back.safetensors"
    run("--kind=clip", "--to=torch", f"--input={model}", f"--output={back}")
    run("--kind=clip", f"--input={back}", f"--output={tmp_path / 'again'}")
    assert read_metadata(tmp_path / "again")["clip"] == read_metadata(model)["clip"]
    with pytest.raises(UserError, match="expected a model of kind clip .*found dit"):
        about = read_metadata(model) | {"kind": "dit"}
        (model / "config.json").write_text(json.dumps(about))
        clip.load_encoder(model, verify=False)


def test_wrong_files_and_configs(golden):
    tensors, config = small_tensors(), openclip_config(golden, "gelu")
    with pytest.raises(UserError, match="expected a CLIP with both towers"):
        clip.infer_config({"ln_final.weight": np.zeros(3)}, config)
    config["model_cfg"]["vision_cfg"]["patch_size"] = 16
    with pytest.raises(UserError, match=r"patch_size 16 \(the tensors have 8\)"):
        clip.infer_config(tensors, config)
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "vit_base"
    with pytest.raises(UserError, match="found timm_model_name vit_base"):
        clip.infer_config(tensors, config)
    with pytest.raises(UserError, match=r"missing: visual\.proj .*unexpected: visual\.head"):
        wrong = tensors | {"visual.head": tensors["visual.proj"]}
        del wrong["visual.proj"]
        clip.from_torch(wrong, small_config())
    for change, message in (
        ({"resize": "crop"}, "resize must be one of shortest, squash, found 'crop'"),
        ({"patch_size": 64}, "image_size must be at least patch_size, found 32 and 64"),
        ({"mean": (0.5,)}, "expected mean of three colours"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(small_config().image, **change)
