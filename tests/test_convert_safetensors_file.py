import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from microdit_jax.convert.formats.safetensors_file import (
    looks_like_safetensors,
    read_safetensors,
    write_safetensors,
)
from microdit_jax.errors import UserError

A = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": A, "n": np.arange(3)}, path, {"made": "by hand"})
    tensors, metadata = read_safetensors(path)
    assert set(tensors) == {"a", "n"} and metadata == {"made": "by hand"}
    np.testing.assert_array_equal(tensors["a"], A)
    assert not tensors["a"].flags.writeable
    assert looks_like_safetensors(path)


def test_the_library_reads_what_we_write(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"small": np.arange(3, dtype=np.uint8), "turned": A.T, "cut": A[:, ::2], "a": A}
    write_safetensors(path, tensors, {"made": "here"})
    found = safetensors.numpy.load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert read_safetensors(path)[1] == {"format": "pt", "made": "here"}


def test_bfloat16_and_casts(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"b": A.astype(ml_dtypes.bfloat16)})
    found = read_safetensors(path)[0]["b"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), A)
    write_safetensors(path, {"b": A, "n": np.arange(3)}, dtype="float16")
    found = read_safetensors(path)[0]
    assert found["b"].dtype == np.float16 and found["n"].dtype == np.int64


def test_truncated_and_damaged(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": A})
    whole = path.read_bytes()
    for length in (4, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated"):
            read_safetensors(path)
    path.write_bytes(whole.replace(b'"F32"', b'"F99"'))
    with pytest.raises(UserError, match="bad header.*F99"):
        read_safetensors(path)
    header = json.dumps({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 48]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + A.tobytes())
    with pytest.raises(UserError, match="bad header"):
        read_safetensors(path)


def test_unknown_types_are_refused(tmp_path):
    with pytest.raises(UserError, match="complex64 at w"):
        write_safetensors(tmp_path / "a.safetensors", {"w": A.astype(np.complex64)})
    assert not list(tmp_path.iterdir())
