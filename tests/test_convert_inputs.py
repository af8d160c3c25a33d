import json

import numpy as np
import pytest
from conftest import GOLDEN
from support.convert_command import fails, run

from microdit_jax.checkpoints.model_folder import load_model, read_metadata
from microdit_jax.convert.__main__ import OPTIONS
from microdit_jax.convert.formats.safetensors_file import read_safetensors, write_safetensors
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.convert.inputs import describe_source, find_input, read_tensors
from microdit_jax.convert.kinds import NAMES, get_kind
from microdit_jax.errors import UserError
from microdit_jax.files import sha256

ONES = {"a": np.ones((2, 3), np.float32)}
TOWERS = {"openclip_text_small": "clip_text", "t5_small": "t5"}


def tensors_of(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        prefix = "state_dict/"
        return {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}


def test_the_best_weights_and_the_config_that_fits(tmp_path):
    kind = get_kind("clip_text")
    for stem in ("pytorch_model", "open_clip_pytorch_model"):
        write_torch(tmp_path / f"{stem}.bin", ONES)
    (tmp_path / "config.json").write_text('{"hidden_act": "gelu"}')
    found = find_input(tmp_path, kind)
    assert [file.name for file in found.files] == ["open_clip_pytorch_model.bin"]
    assert found.config == {"hidden_act": "gelu"}
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    found = find_input(tmp_path / "pytorch_model.bin", kind)
    assert found.config == {"model_cfg": {"quick_gelu": True}}
    assert found.config_from.endswith("open_clip_config.json")
    assert find_input(tmp_path / "pytorch_model.bin", get_kind("t5")).config is None


def test_shards(tmp_path):
    kind = get_kind("t5")
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: ONES["a"]})
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = find_input(tmp_path, kind)
    assert set(read_tensors(found.files, None).tensors) == {"a", "b"}
    about = describe_source(found.files)
    assert about["file"] == "a.safetensors, b.safetensors"
    assert about["sha256"] not in [sha256(file) for file in found.files]
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match="found nothing; check the path"):
        read_tensors(found.files, None)
    write_safetensors(tmp_path / "b.safetensors", ONES)
    with pytest.raises(UserError, match="found a again in .*b.safetensors"):
        read_tensors(found.files, None)


def test_a_given_config_leaves_no_room_for_flags():
    with pytest.raises(UserError, match="found --head_dim too; put them into the config"):
        get_kind("dit").make_config({}, {"dim": 32}, {"head_dim": 8, "expert_capacity": None})


def test_every_kind_is_called_as_its_module_and_its_options_are_flags():
    kinds = [get_kind(name) for name in NAMES]
    assert tuple(kind.name for kind in kinds) == NAMES
    assert {option for kind in kinds for option in kind.options} == set(OPTIONS)


@pytest.mark.parametrize("name", TOWERS)
def test_towers_there_and_back(tmp_path, name, capsys):
    kind, tensors = TOWERS[name], tensors_of(name)
    with np.load(GOLDEN / f"{name}.npz") as file:
        given = json.loads(str(file["config"]))
    if given.pop("quick_gelu", False):
        given["activation"] = "quick_gelu"
    (tmp_path / "given.json").write_text(json.dumps(given))
    config = get_kind(kind).infer_config(tensors, given)
    write_safetensors(tmp_path / "tower.safetensors", tensors)
    run(f"--kind={kind}", f"--input={tmp_path / 'tower.safetensors'}",
        f"--config={tmp_path / 'given.json'}", f"--output={tmp_path / 'model'}")  # fmt: skip
    assert get_kind(kind).describe(config) in capsys.readouterr().out
    params, metadata = load_model(tmp_path / "model")
    assert get_kind(kind).config_from_dict(metadata[kind]) == config
    back = tmp_path / "back.safetensors"
    run(f"--kind={kind}", "--to=torch", f"--input={tmp_path / 'model'}", f"--output={back}")
    found, _ = read_safetensors(back)
    for key in found:
        np.testing.assert_array_equal(found[key], tensors[key])
    # What was written brings its own config.
    run(f"--kind={kind}", f"--input={back}", f"--output={tmp_path / 'again'}")
    assert read_metadata(tmp_path / "again")["parameters"] == metadata["parameters"]
    error = fails(
        capsys, f"--kind={kind}", f"--input={back}", f"--output={tmp_path / 'x'}", "--head_dim=8"
    )
    assert f"--head_dim does not go with --kind={kind}" in error


@pytest.mark.parametrize("kind", ["dit", "t5"])
@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "model.fp16.safetensors.index.json",
             "model.safetensors.index.fp16.json", "pytorch_model.bin.index.fp16.json"],
)  # fmt: skip
def test_shards_by_any_spelling_of_their_index(tmp_path, kind, name):
    """In a folder, and the index itself given as the input."""
    names = [f"part-{i}.safetensors" for i in range(2)]
    for i, file in enumerate(names):
        write_safetensors(tmp_path / file, {f"w{i}": ONES["a"]})
    (tmp_path / name).write_text(json.dumps({"weight_map": {"w0": names[0], "w1": names[1]}}))
    for given in (tmp_path, tmp_path / name):
        found = find_input(given, get_kind(kind))
        assert [file.name for file in found.files] == names
        assert set(read_tensors(found.files, None).tensors) == {"w0", "w1"}
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="expected a weight_map of file names in .*" + name):
        find_input(tmp_path / name, get_kind(kind))


def test_a_file_beside_an_index_is_taken_and_said(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ONES)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    found = find_input(tmp_path, get_kind("t5"))
    assert [file.name for file in found.files] == ["model.safetensors"]
    assert found.notes == [
        "weights in model.safetensors; left aside model.safetensors.index.json and its shards"
    ]


def test_a_folder_with_one_file_of_a_network(tmp_path):
    """Whatever its name; of two neither is guessed."""
    write_torch(tmp_path / "ep3-ba1000-rank0.pt", ONES)
    (tmp_path / "log.txt").touch()
    kind = get_kind("dit")
    assert [file.name for file in find_input(tmp_path, kind).files] == ["ep3-ba1000-rank0.pt"]
    write_torch(tmp_path / "ep4-ba2000-rank0.pt", ONES)
    with pytest.raises(UserError, match="found ep3-ba1000-rank0.pt, ep4-ba2000-rank0.pt, log.txt"):
        find_input(tmp_path, kind)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin"])
def test_pointers_of_git_lfs(tmp_path, capsys, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / name).write_bytes(pointer)
    error = fails(capsys, f"--input={tmp_path / name}", f"--output={tmp_path / 'm'}")
    assert "found a Git LFS pointer; fetch the real file: git lfs pull" in error
    (tmp_path / "config.json").write_bytes(pointer)
    error = fails(capsys, "--kind=vae", f"--input={tmp_path / name}", f"--output={tmp_path / 'm'}")
    assert "config.json, found a Git LFS pointer" in error


def test_what_is_ours_is_not_converted(tmp_path, capsys):
    error = fails(capsys, "--input=instant", f"--output={tmp_path / 'm'}")
    assert "found a model of ours" in error and "--to=torch" in error
