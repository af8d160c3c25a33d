import pathlib

import numpy as np
import pytest

from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.convert.state_dict import find_tensors, read_state_dict, strip_prefixes
from microdit_jax.errors import UserError

FILES = pathlib.Path(__file__).parent / "golden" / "torch_files"
A = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize("name", ["state_dict", "training"])
def test_wrapped_files(name):
    found = read_state_dict(FILES / f"{name}.pt", "dit")
    assert list(found.tensors) == ["weight"]
    np.testing.assert_array_equal(found.tensors["weight"], A)


def test_what_is_left_aside_is_said():
    notes = " ".join(read_state_dict(FILES / "training.pt", "dit").notes)
    for part in ("state.model", "dit.", "ignored 1 tensors of vae.", "tensors of text_encoder."):
        assert part in notes


@pytest.mark.parametrize(
    "nest",
    [
        lambda d: d,
        lambda d: {"state_dict": d, "epoch": 1},
        lambda d: {"state": {"model": d, "optimizers": {}}, "rng": []},
    ],
)
@pytest.mark.parametrize(
    "prefix",
    ["", "dit.", "module.", "_orig_mod.", "module.dit._orig_mod.", "_orig_mod.module.dit."],
)
def test_every_nesting_and_prefix(nest, prefix):
    contents = nest({f"{prefix}a.weight": A, f"{prefix}blocks.0._orig_mod.b": A + 1})
    found = strip_prefixes(find_tensors(contents).tensors, "dit").tensors
    assert set(found) == {"a.weight", "blocks.0.b"}
    np.testing.assert_array_equal(found["blocks.0.b"], A + 1)


def test_without_the_part_nothing_is_left_aside():
    found = strip_prefixes({"vae.a": A, "b": A}, "dit")
    assert set(found.tensors) == {"vae.a", "b"} and not found.notes


def test_two_tensors_of_one_name():
    with pytest.raises(UserError, match="more than one for a; save"):
        strip_prefixes({"module.a": A, "a": A})


def test_no_state_dict():
    with pytest.raises(UserError, match=r"expected a state dict.*found \['epoch'\]"):
        find_tensors({"epoch": 3})
    with pytest.raises(UserError, match="found list"):
        find_tensors([A])


def test_the_format_is_told_by_content(tmp_path):
    write_safetensors(tmp_path / "a.bin", {"dit.a": A})
    write_torch(tmp_path / "b.bin", {"dit.a": A})
    for name in ("a.bin", "b.bin"):
        assert set(read_state_dict(tmp_path / name, "dit").tensors) == {"a"}
