"""The network's config: what a file tells, what it does not, and what is written into ours."""

import dataclasses
import json

import pytest
from conftest import load_golden
from support.convert_command import fails, run
from support.synthetic import synthetic_dit

from convert import parity
from microdit_jax.checkpoints.model_folder import read_metadata
from microdit_jax.convert import dit
from microdit_jax.convert.arguments import config_from_fields
from microdit_jax.convert.dit_infer import infer_config_strictly, known_arch
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.errors import UserError
from microdit_jax.models import ARCHES
from microdit_jax.models.dit import DiTConfig

# A network whose shapes suggest heads of 16 and whose capacity is the reference's own default.
CUSTOM = dataclasses.replace(
    load_golden("dit_small").config, patch_mixer_dim=32, head_dim=4, expert_capacity=1.0
)


@pytest.fixture
def model(tmp_path):
    """A model folder of a network with a config that its shapes do not tell."""
    write_torch(tmp_path / "foreign.pt", synthetic_dit(CUSTOM, 0))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(CUSTOM)))
    flags = ("--input", tmp_path / "foreign.pt", "--config", tmp_path / "config.json")
    run(*flags, "--output", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_files_we_make_keep_their_config(tmp_path, model, capsys, suffix):
    file = tmp_path / f"ours.{suffix}"
    run("--to=torch", "--input", model, "--output", file)
    capsys.readouterr()
    run("--input", file, "--output", tmp_path / "again")
    report = capsys.readouterr().out
    assert f"read from {file.name}" in report and "assumed" not in report
    assert read_metadata(tmp_path / "again")["dit"] == read_metadata(model)["dit"]
    # Flags that say the same do no harm; others are refused.
    run("--input", file, "--output", tmp_path / "third", "--head_dim=4", "--expert_capacity=1")
    error = fails(capsys, "--input", file, "--output", tmp_path / "b", "--head_dim=8")
    assert "expected the config alone (head_dim 4), found --head_dim too" in error
    error = fails(capsys, "--kind=inception", "--input", file, "--output", tmp_path / "b")
    assert "expected a model of kind inception" in error and "--kind=dit" in error


def test_parity_takes_the_config_of_our_files(tmp_path, model, capsys):
    run("--to=torch", "--input", model, "--output", tmp_path / "ours.pt")
    capsys.readouterr()
    flags = parity.parse_arguments([f"--input={tmp_path / 'ours.pt'}", "--activations=a.npz"])
    assert parity.load(flags)[0] == CUSTOM
    told = capsys.readouterr().err
    assert "heads of 4" in told and "capacity 1" in told and "read from ours.pt" in told
    foreign = [f"--input={tmp_path / 'foreign.pt'}", "--activations=a.npz"]
    with pytest.raises(UserError, match="--head_dim=... --expert_capacity=..., or"):
        parity.load(parity.parse_arguments(foreign))
    stated = parity.parse_arguments([*foreign, f"--config={tmp_path / 'config.json'}"])
    assert parity.load(stated)[0] == CUSTOM


def test_nothing_is_guessed_of_an_unknown_architecture(tmp_path, capsys):
    write_safetensors(tmp_path / "a.safetensors", synthetic_dit(CUSTOM, 0))
    flags = ("--input", tmp_path / "a.safetensors", "--output", tmp_path / "model")
    error = fails(capsys, *flags)
    assert "MicroDiT_XL_2 or MicroDiT_Tiny_2, found a network of width 32 and depth 4" in error
    assert "give python -m convert --head_dim=... --expert_capacity=..., or" in error
    assert "head_dim no shape tells" in fails(capsys, *flags, "--expert_capacity=1")
    assert "expert_capacity no shape tells" in fails(capsys, *flags, "--head_dim=4")
    assert not (tmp_path / "model").exists()
    run(*flags, "--head_dim=4", "--expert_capacity=1")
    report = capsys.readouterr().out
    assert "given: head_dim 4, expert_capacity 1; assumed to be the reference's: norm_eps" in report
    stored = dit.config_from_dict(read_metadata(tmp_path / "model")["dit"])
    assert (stored.head_dim, stored.expert_capacity) == (4, 1.0)


def test_without_experts_no_capacity_is_asked_for():
    config = dataclasses.replace(CUSTOM, experts_every_n=5)
    assert infer_config_strictly(synthetic_dit(config, 0), head_dim=4).head_dim == 4


@pytest.mark.parametrize("arch", ARCHES)
def test_the_published_architectures_are_assumed_and_this_is_said(arch):
    config = ARCHES[arch](num_experts=4, in_channels=16, input_size=64)
    assert known_arch(config) == arch
    assert known_arch(dataclasses.replace(config, head_dim=16)) is None
    assert known_arch(dataclasses.replace(config, use_bias=True)) is None
    told = dit.describe_origin(config, {"expert_capacity": 2.0})
    assert f"given: expert_capacity 2; assumed to be {arch}'s: head_dim {config.head_dim}" in told


def test_a_damaged_note(tmp_path, capsys):
    for note in (b"[]", b"{", b'{"kind": "dit", "config": 3}', b'{"kind": "dit", "config": {}}'):
        write_torch(tmp_path / "a.pt", synthetic_dit(CUSTOM, 0), notes={"extra/microdit_jax": note})
        assert fails(capsys, "--input", tmp_path / "a.pt", "--output", tmp_path / "model")


def test_whole_numbers_in_the_place_of_floats():
    """As JSON has them: the reference's own default capacity is 1."""
    fields = {"expert_capacity": 1, "qkv_multipliers": [1] * 28, "ffn_multipliers": [4] * 28}
    config = config_from_fields(DiTConfig, fields)
    assert type(config.expert_capacity) is float
    assert {type(value) for value in config.qkv_multipliers} == {float}
