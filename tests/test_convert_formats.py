"""Any tensors come back from both file formats bit for bit; damage is told in one line."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from microdit_jax.convert.formats import safetensors_file, torch_names
from microdit_jax.convert.formats.safetensors_file import read_safetensors, write_safetensors
from microdit_jax.convert.formats.torch_file import read_torch, write_torch
from microdit_jax.errors import UserError

FORMATS = {
    "pt": (write_torch, read_torch, sorted(torch_names.STORAGES.values(), key=str)),
    "safetensors": (
        write_safetensors,
        lambda path: read_safetensors(path)[0],
        list(safetensors_file.NAMES),
    ),
}
QUICK = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def arrays(draw, dtypes) -> np.ndarray:
    """Arrays of any bits, 0-d and empty ones too: transposed, reversed, strided, repeated."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    bits = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = int(np.prod(shape)) * dtype.itemsize
    data = bits.integers(0, 2 if dtype.kind == "b" else 256, size, np.uint8)
    array = data.view(dtype).reshape(shape)
    if draw(st.booleans()):
        array = array.transpose(draw(st.permutations(range(array.ndim))))
    if draw(st.booleans()):
        steps = st.sampled_from([slice(None), slice(None, None, -1), slice(0, 4, 2), slice(1, 3)])
        array = np.asarray(array[tuple(draw(steps) for _ in shape)])  # of a 0-d array a scalar
    if draw(st.booleans()):
        array = np.broadcast_to(array, (draw(st.integers(0, 3)), *array.shape))
    return array


@pytest.mark.parametrize("suffix", FORMATS)
def test_any_tensors_come_back_bit_for_bit(tmp_path, suffix):
    write, read, dtypes = FORMATS[suffix]
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)

    @QUICK
    @given(st.dictionaries(names.filter(lambda name: name != "__metadata__"), arrays(dtypes)))
    def check(tensors):
        write(tmp_path / f"a.{suffix}", tensors)
        found = read(tmp_path / f"a.{suffix}")
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert found[name].tobytes() == tensor.tobytes()

    check()


@pytest.mark.parametrize("suffix", FORMATS)
def test_damage_is_told_or_harmless(tmp_path, suffix):
    write, read, _ = FORMATS[suffix]
    tensors = {"a": np.arange(12, dtype=np.float32).reshape(3, 4).T, "b": np.ones((), np.int64)}
    write(tmp_path / f"a.{suffix}", tensors)
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    damaged = tmp_path / f"b.{suffix}"

    @settings(QUICK, max_examples=300)
    @given(st.integers(0, len(whole) - 1), st.integers(0, 255), st.booleans())
    def check(position, byte, cut):
        changed = bytearray(whole[:position] if cut else whole)
        if not cut:
            changed[position] = byte
        damaged.write_bytes(changed)
        try:
            for tensor in read(damaged).values():
                np.asarray(tensor).tobytes()
        except UserError as error:
            assert "\n" not in str(error)

    check()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 8]},
        {"dtype": "X32", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.5], "data_offsets": [0, 8]},
        [],
        None,
    ],
)
def test_headers_that_cannot_be(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="fetch it again"):
        read_safetensors(path)
