import json

import ml_dtypes
import numpy as np
import pytest
from conftest import load_golden
from support.convert_command import fails, run

from microdit_jax.checkpoints.model_folder import load_model, read_metadata
from microdit_jax.convert.formats.safetensors_file import read_safetensors, write_safetensors
from microdit_jax.convert.formats.torch_file import read_torch, write_torch
from microdit_jax.models.dit import DiTConfig

SIZES = ("--head_dim=8", "--expert_capacity=2")  # of the network below, which no shape tells


@pytest.fixture
def tensors():
    golden = load_golden("dit_small")
    return {
        key.removeprefix("state_dict/"): golden.arrays[key] for key in golden.keys("state_dict/")
    }


@pytest.fixture
def file(tmp_path, tensors):
    write_torch(tmp_path / "dit.pt", tensors)
    return tmp_path / "dit.pt"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_round_trip(tmp_path, file, tensors, suffix, capsys):
    run("--kind=dit", *SIZES, f"--input={file}", f"--output={tmp_path / 'model'}")
    report = capsys.readouterr().out
    assert "4 blocks of width 32" in report and "parameters" in report and "MB/s" in report
    back = tmp_path / f"back.{suffix}"
    run("--to=torch", f"--input={tmp_path / 'model'}", f"--output={back}")
    found = read_torch(back) if suffix == "pt" else read_safetensors(back)[0]
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].view(np.uint32), tensor.view(np.uint32))


def test_the_config_is_stored_beside_the_weights(tmp_path, file):
    run("--input", file, "--output", tmp_path / "model", *SIZES)
    params, metadata = load_model(tmp_path / "model")
    config = DiTConfig(**metadata["dit"])
    assert (metadata["kind"], config.dim, config.in_channels) == ("dit", 32, 4)
    assert metadata["source"]["file"] == "dit.pt" and len(metadata["source"]["sha256"]) == 64
    assert params["blocks_0"]["attn"]["qkv"]["kernel"].shape == (32, 48)


def test_the_same_command_again_does_nothing(tmp_path, file, capsys):
    model, back = tmp_path / "model", tmp_path / "back.pt"
    for arguments, output in (
        (("--input", file, "--output", model, *SIZES), model / "manifest.json"),
        (("--to=torch", "--input", model, "--output", back), back),
    ):
        run(*arguments)
        before = output.stat().st_mtime_ns
        capsys.readouterr()
        run(*arguments)
        assert "nothing to do" in capsys.readouterr().out
        assert output.stat().st_mtime_ns == before
    assert "choose another" in fails(
        capsys, "--input", file, "--output", model, "--head_dim=8", "--expert_capacity=1"
    )
    assert "made from something else" in fails(
        capsys, "--to=torch", "--input", model, "--output", back, "--dtype=float16"
    )


def test_another_output_in_the_way(tmp_path, file, tensors, capsys):
    run("--input", file, "--output", tmp_path / "model", *SIZES)
    changed = tensors | {"final_layer.linear.bias": tensors["final_layer.linear.bias"] + 1}
    write_torch(tmp_path / "other.pt", changed)
    error = fails(capsys, "--input", tmp_path / "other.pt", "--output", tmp_path / "model")
    assert "expected" in error and "choose another folder or remove it" in error
    (tmp_path / "folder").mkdir()
    error = fails(capsys, "--input", file, "--output", tmp_path / "folder")
    assert "found another folder" in error


def test_wrapped_safetensors_and_what_was_ignored(tmp_path, tensors, capsys):
    wrapped = {f"dit._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    vae = {"vae.decoder.weight": np.zeros((2, 2), np.float32)}
    write_safetensors(tmp_path / "a.safetensors", wrapped | vae)
    run("--input", tmp_path / "a.safetensors", "--output", tmp_path / "model", *SIZES)
    assert "ignored 1 tensors of vae." in capsys.readouterr().out
    assert read_metadata(tmp_path / "model")["dit"]["dim"] == 32


def test_types_to_write(tmp_path, file, tensors):
    run("--input", file, "--output", tmp_path / "model", *SIZES)
    back = tmp_path / "back.safetensors"
    run("--to=torch", "--input", tmp_path / "model", "--output", back, "--dtype=bfloat16")
    for name, tensor in read_safetensors(back)[0].items():
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, tensors[name].astype(ml_dtypes.bfloat16))
    run("--input", back, "--output", tmp_path / "again")  # constants still fit in this precision
    assert read_metadata(tmp_path / "again")["dit"] == read_metadata(tmp_path / "model")["dit"]


def test_a_given_config(tmp_path, file, capsys):
    golden = load_golden("dit_small")
    path = tmp_path / "config.json"
    path.write_text(str(golden.arrays["config"]))
    run("--input", file, "--output", tmp_path / "model", "--config", path)
    stored = DiTConfig(**read_metadata(tmp_path / "model")["dit"])
    assert stored == golden.config  # its own ratios, not the ones the widths would suggest
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_bias": True}))
    error = fails(capsys, "--input", file, "--output", tmp_path / "b", "--config", path)
    assert "missing: blocks.0.attn.proj.bias (32,)" in error
    path.write_text("not json")
    fails(capsys, "--input", file, "--output", tmp_path / "b", "--config", path)
    assert not (tmp_path / "b").exists()


def test_bad_flags_and_inputs(tmp_path, file, capsys):
    out = f"--output={tmp_path / 'model'}"
    assert "--inptu" in fails(capsys, "--input", file, out, "--inptu=3")
    assert "invalid choice" in fails(capsys, "--kind=unet", "--input", file, out)
    assert "required" in fails(capsys, "--input", file)
    assert "does not go with --to=orbax" in fails(capsys, "--input", file, out, "--dtype=float16")
    assert "check the path" in fails(capsys, f"--input={tmp_path / 'none.pt'}", out)
    back = f"--output={tmp_path / 'back.pt'}"
    error = fails(capsys, "--to=torch", f"--input={tmp_path / 'none'}", back)
    assert "expected a model folder" in error
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:-100])
    assert "truncated" in fails(capsys, f"--input={tmp_path / 'cut.pt'}", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pt", "dit.pt"]


def test_nan_weights_leave_nothing(tmp_path, tensors, capsys):
    tensors["blocks.2.mlp.w3.weight"] = np.full_like(tensors["blocks.2.mlp.w3.weight"], np.nan)
    write_torch(tmp_path / "nan.pt", tensors)
    error = fails(capsys, "--input", tmp_path / "nan.pt", "--output", tmp_path / "model", *SIZES)
    assert "blocks.2.mlp.w3.weight" in error
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pt"]
