"""Weights in float8 with scales beside them."""

import ml_dtypes
import numpy as np
import pytest

from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.inputs import read_tensors
from microdit_jax.convert.scaled import apply_scales
from microdit_jax.errors import UserError

F8 = ml_dtypes.float8_e4m3fn
W = np.arange(-6, 6, dtype=np.float32).reshape(3, 4).astype(F8)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1)])
def test_one_scale_or_one_for_each_row(tmp_path, name, shape):
    scale = np.full(shape, 0.5, np.float32) if shape in ((), (1,)) else np.float32([1, 2, 3])
    scale = scale.reshape(shape)
    tensors = {
        "scaled_fp8": np.zeros(0, F8),
        "a.weight": W,
        "a.bias": np.ones(3, np.float32),
        f"a.{name}": scale,
        "a.scale_input": np.array(2, np.float32),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors)
    found = read_tensors((tmp_path / "a.safetensors",), None)
    assert set(found.tensors) == {"a.weight", "a.bias"}
    each = scale.reshape(-1, 1)
    np.testing.assert_array_equal(found.tensors["a.weight"], W.astype(np.float32) * each)
    assert found.notes == [
        "multiplied 1 float8 weights by their scales",
        "ignored 1 scales of inputs",
    ]


def test_what_cannot_be_applied_is_named():
    one = np.array(1, np.float32)
    for tensors, match in (
        ({"a.weight": W, "a.weight_scale_inv": np.ones((1, 1), np.float32)}, "a.weight_scale_inv"),
        ({"a.weight": W, "a.weight_scale": np.ones(4, np.float32)}, "each of the rows of"),
        ({"a.weight": W, "a.weight_scale": np.ones((1, 3), np.float32)}, "each of the rows of"),
        ({"a.weight": W, "a.weight_scale": np.ones(3, np.uint8)}, "a.weight_scale uint8"),
        ({"a.weight": W.astype(np.float32), "a.scale_weight": one}, "a.weight in a float8 type"),
        ({"a.scale_weight": one}, "a.weight in a float8 type"),
        ({"scale_weight": one}, "expected weight in a float8 type"),
    ):
        with pytest.raises(UserError, match=match):
            apply_scales(tensors)


def test_other_tensors_stay_as_they_are():
    tensors = {"a.weight": W, "a.input_scale_net": W, "b.weight": np.ones(2)}
    found, notes = apply_scales(tensors)
    assert not notes and all(found[name] is tensor for name, tensor in tensors.items())
