"""Bytes of checkpoints: files mapped into memory, and tensors as bytes, a chunk at a time."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8

from microdit_jax.errors import UserError, visible

LFS = b"version https://git-lfs"  # begins a pointer, where the real file was not fetched
CHUNK = 1 << 24  # bytes handled at a time, so that no second copy of a file is ever held


def map_bytes(path: str | os.PathLike) -> UInt8[np.ndarray, " b"]:
    """Maps a file into memory as a read-only uint8 array, read page by page when touched.

    Raises:
      UserError: there is no such file, or it is a folder or empty.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise UserError(f"expected a checkpoint file at {path}, found {found}; check the path")
    if not path.stat().st_size:
        raise UserError(f"expected a checkpoint at {path}, found an empty file; fetch it again")
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise UserError(
                f"expected a checkpoint at {visible(path)}, found a Git LFS pointer; fetch the "
                "real file: git lfs pull"
            )
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def byte_chunks(
    name: str, tensor: Shaped[np.ndarray, "..."], dtype: np.dtype
) -> Iterator[memoryview]:
    """Yields a tensor's bytes in row-major order as `dtype`, a few MB at a time.

    A transposed view is copied chunk by chunk too, never as a whole.

    Args:
      name: of the tensor, for errors.
    Raises:
      UserError: a finite value is too large for `dtype`.
    """
    if not tensor.size:
        return
    if tensor.flags.c_contiguous:
        rows, step = tensor.reshape(-1), CHUNK // dtype.itemsize
    else:
        rows = tensor
        step = max(1, CHUNK * len(tensor) // (tensor.size * dtype.itemsize))
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step])
        if dtype != part.dtype:
            _check_range(name, part, dtype)
            part = part.astype(dtype)
        yield part.reshape(-1).view(np.uint8).data


def _check_range(name: str, part: Shaped[np.ndarray, "..."], dtype: np.dtype) -> None:
    """Raises UserError if a finite value becomes infinite in `dtype`."""
    ends = np.array([part.min(), part.max()])  # a NaN is both, and stays what it is
    with np.errstate(over="ignore"):
        cast = ends.astype(dtype).astype(np.float64)
    if (np.isfinite(ends.astype(np.float64)) & ~np.isfinite(cast)).any():
        raise UserError(
            f"expected values that {dtype} can hold, found {ends[0]:g} to {ends[1]:g} in {name}; "
            "write it as bfloat16 or float32"
        )
