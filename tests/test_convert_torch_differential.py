"""Whatever we read from a PyTorch file equals what torch.load(weights_only=True) reads from it.

Needs a Python with torch: this one, or the one that $TORCH_PYTHON names. The recorded files of
test_convert_torch_file.py and test_convert_integrity.py keep the core of it where there is none.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from microdit_jax.convert.formats.torch_file import read_torch
from microdit_jax.convert.formats.torch_names import DTYPES
from microdit_jax.convert.formats.torch_values import LeftAside

WRITER = pathlib.Path(__file__).parent / "support" / "write_torch_files.py"
COUNT = 500


def torch_python() -> str:
    """A Python that has torch, or skips the test."""
    if given := os.environ.get("TORCH_PYTHON"):
        return given
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed: pip install torch, or name a Python in $TORCH_PYTHON")
    return sys.executable


class Comparison:
    """Compares a value to the tree of what torch read, and counts both sides' kinds."""

    def __init__(self):
        self.seen: Counter[str] = Counter()
        self.starts: dict[int, int] = {}  # addresses of the storages

    def check(self, found, expected: list) -> None:
        kind, *rest = expected
        self.seen[kind] += 1
        if kind == "tensor":
            self._tensor(found, *rest)
        elif kind == "dict":
            assert type(found) is dict
            assert list(found) == [self._key(key) for key, _ in rest[0]]
            for key, value in rest[0]:
                self.check(found[self._key(key)], value)
        elif kind in ("list", "tuple"):
            assert type(found).__name__ == kind and len(found) == len(rest[0])
            for part, value in zip(found, rest[0], strict=True):
                self.check(part, value)
        elif kind == "other":
            assert isinstance(found, LeftAside | bytes), found  # a bytearray of protocol 5
            assert isinstance(found, bytes) or found.is_tensor == (rest == ["tensor"])
        elif kind == "float":
            assert type(found) is float and found.hex() == rest[0]
        elif kind == "bytes":
            assert found == bytes.fromhex(rest[0])
        else:
            assert type(found).__name__ == kind and found == rest[0]

    @staticmethod
    def _key(node: list):
        return float.fromhex(node[1]) if node[0] == "float" else node[1]

    def _tensor(self, found, dtype, shape, stride, where, raw) -> None:
        assert isinstance(found, np.ndarray), (found, dtype)
        assert found.dtype == np.dtype(DTYPES[dtype][0]) and list(found.shape) == shape
        assert found.tobytes().hex() == raw
        self.seen[dtype] += 1
        if not found.size:
            return
        for size, ours, theirs in zip(shape, found.strides, stride, strict=True):
            assert size == 1 or ours == theirs * found.itemsize
        # Tensors of one storage share its memory, each at its own offset.
        place, offset = where
        start = found.__array_interface__["data"][0] - offset
        assert self.starts.setdefault(place, start) == start


def test_what_we_read_equals_what_torch_reads(tmp_path):
    command = [torch_python(), "-W", "ignore", str(WRITER), str(tmp_path), str(COUNT)]
    subprocess.run(command, check=True, timeout=300)
    seen: Counter[str] = Counter()
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) >= COUNT
    for file in files:
        comparison = Comparison()
        try:
            comparison.check(read_torch(file.with_suffix(".pt")), json.loads(file.read_text()))
        except AssertionError as error:
            raise AssertionError(f"{file.stem}.pt, of {WRITER.name}: {error}") from error
        seen += comparison.seen
    print(len(files), dict(seen))
    assert seen["tensor"] > 3 * COUNT
    assert set(DTYPES) <= set(seen), "a type that no file had"
    assert min(seen[kind] for kind in ("dict", "list", "tuple", "bytes", "other", "float")) > 50
