"""Reads the format of PyTorch before 1.6, which some public weights still have.

Five pickles (a magic number, the version, the machine, the object, the keys of its storages), then
for each key the number of elements and the bytes. Where a storage lies is known only after the
object was read, so the object is read twice: for the sizes, then for the tensors.
"""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from microdit_jax.errors import UserError

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle
VERSION = 1001

# (key, dtype, elements) -> a storage for the unpickler; (bytes, dtype, swapped) -> the same
FindStorage = Callable[[str, np.dtype, int], Any]
MakeStorage = Callable[[np.ndarray, np.dtype, bool], Any]


class _Sizes(NamedTuple):
    dtype: np.dtype
    count: int


def load_legacy(
    path: Path,
    data: UInt8[np.ndarray, " b"],
    load: Callable[[io.BufferedIOBase, FindStorage], Any],
    make_storage: MakeStorage,
) -> Any:
    """Reads the contents of such a file.

    Args:
      data: the file's bytes, mapped; tensors are views of them.
      load: unpickles one object, safely.
    Raises:
      UserError: another version, or truncated; and what `load` raises.
    """
    sizes: dict[str, _Sizes] = {}

    def measure(key: str, dtype: np.dtype | None, count: int):
        if dtype is None or count < 0 or count * dtype.itemsize > len(data):
            raise _truncated(path)
        sizes[key] = _Sizes(dtype, count)
        # A stand-in of the real one's size, whose memory is never touched.
        return make_storage(np.empty(count * dtype.itemsize, np.uint8), dtype, False)

    # A buffered file, in which the unpickler stops where a pickle ends.
    with path.open("rb") as file:
        _, version, machine = (load(file, measure) for _ in range(3))
        if version != VERSION:
            raise UserError(
                f"expected version {VERSION} of the format before PyTorch 1.6 in {path}, found "
                f"{version}; re-save it with a newer one: torch.save(torch.load(FILE), NEW_FILE)"
            )
        swapped = not machine.get("little_endian", True)
        start = file.tell()
        load(file, measure)
        keys, places = load(file, measure), {}
        position = file.tell()
        for key in keys:
            head = bytes(data[position : position + 8])
            if len(head) < 8 or key not in sizes:
                raise _truncated(path)
            (count,) = struct.unpack(">q" if swapped else "<q", head)
            end = position + 8 + count * sizes[key].dtype.itemsize
            if count != sizes[key].count or end > len(data):
                raise _truncated(path)
            places[key], position = data[position + 8 : end], end
        file.seek(start)
        return load(file, lambda key, dtype, _: make_storage(places[key], dtype, swapped))


def _truncated(path: Path) -> UserError:
    return UserError(
        f"expected storages as large as the tensors in {path}, found it truncated or damaged; fetch"
        " it again"
    )
