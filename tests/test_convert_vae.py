import json
import math
import pathlib

import ml_dtypes
import numpy as np
import pytest
from conftest import relative_l2
from support.convert_command import fails, run
from support.golden_vae import load_vae

from microdit_jax.checkpoints.model_folder import read_metadata
from microdit_jax.convert.formats.safetensors_file import read_safetensors, write_safetensors
from microdit_jax.convert.formats.torch_file import read_torch, write_torch
from microdit_jax.convert.vae import (
    config_from_dict,
    config_json,
    describe,
    from_torch,
    infer_config,
    load_codec,
    rename_table,
    to_torch,
)
from microdit_jax.encoders.vae import VaeConfig
from microdit_jax.encoders.vae_codec import VaeCodec
from microdit_jax.errors import UserError
from microdit_jax.trees import flatten

GOLDEN = pathlib.Path(__file__).parent / "golden"
SDXL = VaeConfig((128, 256, 512, 512), 4, 0.13025)
OSTRIS = VaeConfig((128, 128, 256, 512), 16, 0.2614)
NEW_TO_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def small():
    return load_vae("vae_small")


def old_names(tensors: dict, *, convolutions: bool) -> dict:
    """The state dict as diffusers wrote it before version 0.15."""
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in NEW_TO_OLD.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                if convolutions and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    assert set(renamed) != set(tensors)
    return renamed


def shapes_only(shapes: dict) -> dict:
    """A state dict of these shapes that takes no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path, small):
    """A VAE as diffusers saves one."""
    folder = tmp_path / "pipeline" / "vae"
    folder.mkdir(parents=True)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", small.tensors)
    (folder / "config.json").write_text(json.dumps(small.config_json))
    return folder


@pytest.mark.parametrize("name", ["vae_small", "vae_small_16ch"])
def test_both_ways_bit_for_bit(name):
    golden = load_vae(name)
    config = infer_config(golden.tensors, golden.config_json)
    assert config == golden.config
    back = to_torch(from_torch(golden.tensors, config), config)
    assert set(back) == set(golden.tensors)
    for name, tensor in golden.tensors.items():
        np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32))


@pytest.mark.parametrize(
    "name, config, parameters",
    [("vae_sdxl", SDXL, 83_653_863), ("vae_ostris", OSTRIS, 57_266_643)],
)
def test_full_size_tensors_are_diffusers_own(name, config, parameters):
    expected = {k: tuple(s) for k, s in json.loads((GOLDEN / f"{name}.json").read_text()).items()}
    assert {e.torch_name: e.torch_shape for e in rename_table(config)} == expected
    assert sum(math.prod(entry.flax_shape) for entry in rename_table(config)) == parameters
    factor = config.scaling_factor
    assert infer_config(shapes_only(expected), scaling_factor=factor) == config


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_attention_names(small, convolutions):
    tensors = old_names(small.tensors, convolutions=convolutions)
    params = from_torch(tensors, infer_config(tensors, small.config_json))
    for path, leaf in flatten(small.params).items():
        np.testing.assert_array_equal(flatten(params)[path], leaf)


def test_both_names_of_one_tensor(small):
    name = "decoder.mid_block.attentions.0.to_q.weight"
    tensors = small.tensors | {name.replace("to_q", "query"): small.tensors[name]}
    with pytest.raises(UserError, match=f"{name} under its old and its new name"):
        from_torch(tensors, small.config)


def test_all_faults_at_once(small):
    tensors = dict(small.tensors)
    del tensors["encoder.conv_norm_out.bias"]
    tensors["quant_conv.weight"] = tensors["quant_conv.weight"][:4]
    tensors["loss.logvar"] = np.zeros(1, np.float32)
    with pytest.raises(UserError) as caught:
        from_torch(tensors, small.config)
    for part in (
        "missing: encoder.conv_norm_out.bias (16,)",
        "unexpected: loss.logvar (1,)",
        "quant_conv.weight (expected (8, 8, 1, 1), found (4, 8, 1, 1))",
    ):
        assert part in str(caught.value)


def test_not_finite_weights_are_named(small):
    tensors = dict(small.tensors)
    tensors["post_quant_conv.bias"] = np.full(4, np.inf, np.float32)
    with pytest.raises(UserError, match="1 tensors: post_quant_conv.bias"):
        from_torch(tensors, small.config)


def test_the_scaling_factor_is_never_guessed(small):
    groups = {"norm_num_groups": 4}
    with pytest.raises(UserError, match=r"--scaling_factor=0\.13025 \(SDXL"):
        infer_config(small.tensors, groups)
    assert infer_config(small.tensors, groups, scaling_factor=0.3).scaling_factor == 0.3
    given = groups | {"scaling_factor": 0.2447}
    assert infer_config(small.tensors, given).scaling_factor == 0.2447
    assert infer_config(small.tensors, given, scaling_factor=0.2447).scaling_factor == 0.2447
    with pytest.raises(UserError, match=r"scaling_factor 0\.2447, found 0\.3 asked for"):
        infer_config(small.tensors, given, scaling_factor=0.3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latent_channels": 16}, r"latent_channels 16 \(the tensors have 4\)"),
        ({"block_out_channels": [8, 8, 16]}, r"\[8, 8, 16\] \(the tensors have \(8, 16, 16\)\)"),
        ({"act_fn": "gelu"}, "expected act_fn as 'silu' .*found act_fn gelu; .* not supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"use_quant_conv": False}, "use_quant_conv False"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"scaling_factor": "0.13"}, "scaling_factor as a number .*found scaling_factor '0.13'"),
        ({"shift_factor": [0.1]}, "shift_factor as a number .*found shift_factor"),
        ({"latents_mean": [0.1, 0.2]}, "4 latents_mean with as many positive latents_std"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 1.0, 0.0]}, "positive latents_std"),
        (
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 1.0},
            "a shift_factor or latents_mean, found both",
        ),
        ({"mid_block_add_attention": False}, "expected mid_block_add_attention as True"),
        ({"new_feature": 3}, "expected new_feature left out"),
        ({"norm_num_groups": 5}, "multiples of norm_num_groups 5"),
    ],
    ids=str,
)
def test_configs_of_other_networks(small, changes, message):
    with pytest.raises(UserError, match=message):
        infer_config(small.tensors, small.config_json | changes)


def test_fields_without_effect(small):
    more = {"force_upcast": True, "shift_factor": None, "latents_std": None, "new_feature": None}
    assert infer_config(small.tensors, small.config_json | more) == small.config


def test_the_constants_of_latents(small):
    """A shift is the file's, unless another is asked for; the reference knows none."""
    shifted = small.config_json | {"shift_factor": -0.2}
    assert infer_config(small.tensors, shifted).shift_factor == -0.2
    assert infer_config(small.tensors, shifted, shift_factor=0.0) == small.config
    constants = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.5, 2.0, 1.0]}
    found = infer_config(small.tensors, small.config_json | constants)
    assert found.latents_mean == (0.1, -0.2, 0.3, 0.0) and "latents_mean" in describe(found)
    assert infer_config(small.tensors, config_json(found)) == found
    codec = VaeCodec("v", found, small.params)
    raw = small.codec().encode(small["image"])
    mean, std = (np.float32(constants[name]) for name in ("latents_mean", "latents_std"))
    np.testing.assert_array_equal(codec.encode(small["image"]), (raw - mean) / std)
    assert relative_l2(codec.decode((raw - mean) / std), small.codec().decode(raw)) < 1e-5


def test_a_vae_as_of_stable_diffusion_3():
    """A shift, and no quantisation convolutions; equal to diffusers, and written as it was."""
    golden = load_vae("vae_small_sd3")
    config = infer_config(golden.tensors, golden.config_json)
    assert (config.shift_factor, config.use_quant_conv) == (0.0609, False)
    codec = VaeCodec("v", config, golden.params)
    latents = codec.encode(golden["image"]) * np.float32(codec.scaling_factor)
    assert relative_l2(latents, golden["latent"]) < 2e-5
    decoded = codec.decode(latents / np.float32(codec.scaling_factor))
    assert relative_l2(decoded, np.clip(golden["decoded"], -1, 1)) < 2e-5
    back = to_torch(golden.params, config)
    assert set(back) == set(golden.tensors)
    written = config_json(config)
    aside = {"_diffusers_version", "force_upcast", "sample_size", "mid_block_add_attention"}
    assert {k: v for k, v in golden.config_json.items() if k not in aside} == written
    other = golden.config_json | {"use_quant_conv": True}
    with pytest.raises(UserError, match=r"use_quant_conv True \(the tensors have False\)"):
        infer_config(golden.tensors, other)


def test_what_is_not_such_a_vae(small):
    with pytest.raises(UserError, match=r"diffusers AutoencoderKL, found none of .*name its kind"):
        infer_config({"x": np.zeros((2, 2), np.float32)}, scaling_factor=1.0)
    original = {"encoder.down.0.block.0.conv1.weight": np.zeros((8, 8, 3, 3), np.float32)}
    with pytest.raises(UserError, match="original latent diffusion names"):
        infer_config(original, scaling_factor=1.0)


def test_config_fields():
    fields = json.loads(json.dumps(config_json(SDXL)))
    assert fields["block_out_channels"] == [128, 256, 512, 512] and "dtype" not in fields
    with pytest.raises(UserError, match="unknown widht, missing latent_channels, scaling_factor"):
        config_from_dict({"block_out_channels": [32], "widht": 3})


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("whole_pipeline", [False, True])
def test_from_a_folder_and_back(tmp_path, small, folder, suffix, whole_pipeline, capsys):
    if suffix == "bin":
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        write_torch(folder / "diffusion_pytorch_model.bin", small.tensors)
    source = folder.parent if whole_pipeline else folder
    run("--kind=vae", f"--input={source}", f"--output={tmp_path / 'model'}")
    report = capsys.readouterr().out
    assert "scaling_factor 0.13025" in report and "MB/s" in report
    assert f"weights in diffusion_pytorch_model.{suffix}" in report
    assert ("taken from its folder vae" in report) == whole_pipeline
    back = tmp_path / f"back.{suffix}"
    run("--kind=vae", "--to=torch", f"--input={tmp_path / 'model'}", f"--output={back}")
    found = read_torch(back) if suffix == "bin" else read_safetensors(back)[0]
    for name, tensor in small.tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    # What was written brings its own config.
    run("--kind=vae", f"--input={back}", f"--output={tmp_path / 'again'}")
    assert read_metadata(tmp_path / "again")["vae"] == read_metadata(tmp_path / "model")["vae"]


def test_the_written_config_is_diffusers(tmp_path, small, folder):
    run("--kind=vae", f"--input={folder}", f"--output={tmp_path / 'model'}")
    back = tmp_path / "back.safetensors"
    run("--kind=vae", "--to=torch", f"--input={tmp_path / 'model'}", f"--output={back}")
    written = json.loads(read_safetensors(back)[1]["config.json"])
    assert written["_class_name"] == "AutoencoderKL"
    assert {k: v for k, v in small.config_json.items() if k != "sample_size"}.items() <= (
        written.items()
    )


def test_full_precision_is_preferred(tmp_path, small, folder, capsys):
    whole = folder / "diffusion_pytorch_model.safetensors"
    half = folder / "diffusion_pytorch_model.fp16.safetensors"
    write_safetensors(half, small.tensors, dtype="float16")
    run("--kind=vae", f"--input={folder}", f"--output={tmp_path / 'a'}")
    assert "weights in diffusion_pytorch_model.safetensors" in capsys.readouterr().out
    whole.unlink()
    run("--kind=vae", f"--input={folder}", f"--output={tmp_path / 'b'}")
    assert "float16" in capsys.readouterr().out


def test_shards_with_an_index(tmp_path, small, folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(small.tensors)
    shards = {"one.safetensors": names[:90], "two.safetensors": names[90:]}
    for shard, part in shards.items():
        write_safetensors(folder / shard, {name: small.tensors[name] for name in part})
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    run("--kind=vae", f"--input={folder}", f"--output={tmp_path / 'model'}")
    assert read_metadata(tmp_path / "model")["source"]["file"] == "one.safetensors, two.safetensors"


def test_a_single_file_needs_its_scaling_factor(tmp_path, small, folder, capsys):
    file = tmp_path / "alone.safetensors"
    write_safetensors(file, {f"vae.{name}": tensor for name, tensor in small.tensors.items()})
    arguments = ("--kind=vae", f"--input={file}", f"--output={tmp_path / 'model'}")
    (tmp_path / "config.json").write_text('{"model_type": "something else"}')
    error = fails(capsys, *arguments)
    assert "--scaling_factor=0.13025 (SDXL" in error  # that config.json is of something else
    (tmp_path / "given.json").write_text('{"norm_num_groups": 4}')
    given = f"--config={tmp_path / 'given.json'}"
    assert "--scaling_factor=0.13025 (SDXL" in fails(capsys, *arguments, given)
    run(*arguments, given, "--scaling_factor=0.2")
    assert read_metadata(tmp_path / "model")["vae"]["scaling_factor"] == 0.2
    run("--kind=vae", f"--input={folder / 'diffusion_pytorch_model.safetensors'}",
        f"--output={tmp_path / 'beside'}")  # fmt: skip
    assert read_metadata(tmp_path / "beside")["vae"]["scaling_factor"] == 0.13025


def test_the_same_command_again_does_nothing(tmp_path, small, folder, capsys):
    arguments = ("--kind=vae", f"--input={folder}", f"--output={tmp_path / 'model'}")
    run(*arguments)
    before = (tmp_path / "model" / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    run(*arguments)
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "model" / "manifest.json").stat().st_mtime_ns == before
    (folder / "config.json").write_text(json.dumps(small.config_json | {"scaling_factor": 0.5}))
    assert "choose another folder" in fails(capsys, *arguments)


def test_bad_flags_and_folders(tmp_path, folder, capsys):
    out = f"--output={tmp_path / 'model'}"
    error = fails(capsys, "--kind=vae", f"--input={folder}", out, "--head_dim=8")
    assert "--head_dim does not go with --kind=vae" in error
    error = fails(capsys, "--kind=dit", f"--input={folder}", out)
    assert "expected a MicroDiT state dict" in error and "name its kind" in error
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    error = fails(capsys, "--kind=vae", f"--input={folder.parent}", out)
    assert "expected diffusion_pytorch_model.safetensors (or .bin)" in error
    (folder / "config.json").write_text("{")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert "expected JSON in" in fails(capsys, "--kind=vae", f"--input={folder}", out)
    (folder / "config.json").unlink()
    assert "found an empty file" in fails(capsys, "--kind=vae", f"--input={folder}", out)
    error = fails(capsys, "--kind=vae", f"--input={tmp_path / 'none.bin'}", out)
    assert "check the path" in error
    assert not (tmp_path / "model").exists()


def test_the_codec_of_a_model_folder(tmp_path, small, folder, capsys):
    run("--kind=vae", f"--input={folder}", f"--output={tmp_path / 'model'}")
    codec = load_codec(tmp_path / "model", slice_size=2)
    assert codec.name.startswith("vae:channels=4,scaling_factor=0.13025,weights=")
    images = codec.decode(small["latent"])
    assert relative_l2(images, np.clip(small["decoded"], -1, 1)) < 2e-5
    assert load_codec(tmp_path / "model", dtype="bfloat16").config.dtype == "bfloat16"
    with pytest.raises(UserError, match="overflow in float16"):
        load_codec(tmp_path / "model", dtype="float16")
    error = fails(
        capsys, "--to=torch", f"--input={tmp_path / 'model'}", f"--output={tmp_path / 'x.pt'}"
    )
    assert "give python -m convert --kind=vae" in error


def test_half_precision_weights_become_float32(small):
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in small.tensors.items()}
    params = from_torch(tensors, small.config)
    assert {leaf.dtype for leaf in flatten(params).values()} == {np.dtype(np.float32)}
