"""Reads and writes .safetensors files, memory-mapped and streaming, bfloat16 included.

The format (huggingface/safetensors): 8 bytes of header length, a JSON header
{name: {dtype, shape, data_offsets}} with an optional "__metadata__" of strings, then the bytes.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from microdit_jax.convert.formats.file_bytes import byte_chunks, map_bytes
from microdit_jax.convert.formats.torch_file import output_dtype
from microdit_jax.errors import UserError, visible
from microdit_jax.files import atomic_file, parse_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 100_000_000  # bytes, as the library has it
MAX_AXES = 32
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(
    path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the tensors, as read-only views of the memory-mapped file, and the metadata strings.

    Raises:
      UserError: the file is truncated or not in this format.
    """
    data = map_bytes(path)
    size = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 + size or size > MAX_HEADER:
        raise UserError(
            f"expected a .safetensors header of {size} bytes in {visible(path)}, found "
            f"{len(data) - 8}; the file is truncated or of another format: fetch it again"
        )
    body = data[8 + size :]
    try:
        header = parse_json(data[8 : 8 + size].tobytes(), unique_keys=True)
        if type(header) is not dict:
            raise ValueError(f"a {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
            raise ValueError("__metadata__ that is not of texts")
        entries = {name: _entry(name, entry) for name, entry in header.items()}
        end = _check_layout(entries)
        if end != len(body):
            raise UserError(
                f"expected {end} bytes of tensors in {visible(path)}, found {len(body)}; "
                "the file is truncated: fetch it again"
            )
        tensors = {
            name: body[entry.begin : entry.end].view(entry.dtype).reshape(entry.shape)
            for name, entry in entries.items()
        }
    except (ValueError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"expected the .safetensors format in {visible(path)}, found a bad header "
            f"({type(error).__name__}: {visible(error)}); fetch it again"
        ) from error
    return tensors, metadata


class _Entry(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(name: str, entry: Any) -> _Entry:
    """Returns a tensor's entry of the header; raises ValueError unless it is as large as it says.

    Numbers must be exact and not negative, as the library's own reader (serde, usize) has them.
    """
    if type(entry) is not dict or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} without dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(kind) is not str or kind not in DTYPES:
        raise ValueError(f"{name} has the dtype {kind if type(kind) is str else type(kind)}")
    if type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise ValueError(f"{name} whose shape or data_offsets are no list")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, *offsets)):
        raise ValueError(f"{name} whose shape or data_offsets are no sizes")
    (begin, end), dtype = offsets, DTYPES[kind]
    if len(shape) > MAX_AXES or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} has the bytes {begin} to {end}")
    return _Entry(dtype, tuple(shape), begin, end)


def _check_layout(entries: Mapping[str, _Entry]) -> int:
    """Raises ValueError unless the tensors lie one after the other; returns where they end."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ValueError(f"{name} begins at {entry.begin} and not at {position}")
        position = entry.end
    return position


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: str | None = None,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Writes tensors one by one, holding no second copy; the file appears once it is complete.

    Args:
      tensors: name -> array; views are written as they look.
      metadata: strings for the header.
      dtype: floating types are cast to this ("float32", "bfloat16", "float16"); None keeps them.
      progress: called with the number of bytes just written.
    Raises:
      UserError: a type the format cannot hold, or the disk is full.
    """
    kinds = {name: output_dtype(tensor, dtype) for name, tensor in tensors.items()}
    # Wide types first, so that every tensor stays aligned to its own size.
    order = sorted(tensors, key=lambda name: -kinds[name].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in order:
        if kinds[name] not in NAMES:
            raise UserError(
                f"expected one of {', '.join(DTYPES)} for .safetensors, found {kinds[name]} "
                f"at {name}"
            )
        end = offset + tensors[name].size * kinds[name].itemsize
        header[name] = {
            "dtype": NAMES[kinds[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path, offset + len(text)) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for chunk in byte_chunks(name, tensors[name], kinds[name]):
                file.write(chunk)
                if progress:
                    progress(len(chunk))


def looks_like_safetensors(path: str | os.PathLike) -> bool:
    """Returns True if the file begins as this format does, whatever its name."""
    with Path(path).open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**32
