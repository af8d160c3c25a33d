"""Packs the small arrays of a state together, as its checkpoint stores them.

Orbax takes about 1.5 ms of processor time for each array, however small (measured), and every
state has hundreds of small arrays. They are stored as a few rows of bytes, one for each of the
state's fields: "packed/params", "packed/ema", ... Large arrays are stored one by one. An index in
the checkpoint's own metadata gives each packed array's row, offset, dtype and shape.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from microdit_jax.checkpoints.model_folder import DTYPES
from microdit_jax.trees import flatten, unflatten

SMALL = 2**20  # bytes; writing this many takes about as long as Orbax takes for an array
PACKED = "packed"


class Packed(NamedTuple):
    """Dtype and shape of a small array, and the offset in bytes in its field's row."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def pack(
    state: Any, memory: dict[str, np.ndarray] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Packs a state's small arrays, and makes the index of them.

    Args:
      state: tree of jax arrays. Every process must call; an array is packed if each process has
        the whole of it.
      memory: rows (b,) of bytes of an earlier call, to be written over and updated with this
        call's: to allocate new memory takes many times as long as to copy into it (measured).
    Returns:
      Nested dictionaries of large arrays as they are, and rows of bytes as uint8 NumPy arrays,
      copied, so that the state may be donated; and the index in JSON's types, for `read_index`.
    """
    large, small = {}, {}
    for path, leaf in flatten(state).items():
        whole = leaf.is_fully_addressable or leaf.is_fully_replicated
        (small if whole and leaf.nbytes < SMALL else large)[path] = leaf
    memory = {} if memory is None else memory
    rows: dict[str, list[np.ndarray]] = {}
    index, sizes = {}, {}
    for path, array in jax.device_get(small).items():
        row = row_of(path)
        offset = sizes.get(row, 0)
        index[path] = [array.dtype.name, list(array.shape), offset]
        sizes[row] = offset + array.nbytes
        rows.setdefault(row, []).append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    for row, parts in rows.items():
        if row not in memory or memory[row].size != sizes[row]:
            memory[row] = np.empty(sizes[row], np.uint8)
        np.concatenate(parts, out=memory[row])
    return unflatten(large | {row: memory[row] for row in rows}), {PACKED: index}


def read_index(metadata: Mapping[str, Any] | None) -> dict[str, Packed]:
    """Reads the index that `pack` made; empty for a checkpoint that packs nothing.

    Raises:
      ValueError: the index is not of `pack`'s form.
    """
    index = {
        path: Packed(dtype, tuple(shape), offset)
        for path, (dtype, shape, offset) in (metadata or {}).get(PACKED, {}).items()
    }
    for path, (dtype, shape, offset) in index.items():
        if not DTYPES.fullmatch(dtype) or not all(
            type(n) is int and n >= 0 for n in (*shape, offset)
        ):
            raise ValueError(f"a packed array {path} of {dtype} {shape} at {offset}")
    return index


def row_of(path: str) -> str:
    """Names the row in which the array of this path is packed: that of its field of the state."""
    return f"{PACKED}/{path.split('/')[0]}"


def rows_of(paths: Iterable[str]) -> set[str]:
    """Names the rows that hold these arrays."""
    return {row_of(path) for path in paths}


def unpack(
    row: UInt8[np.ndarray, " b"], packed: Packed, abstract: jax.ShapeDtypeStruct
) -> Shaped[jax.Array, "..."]:
    """Returns one array of a row of bytes, with `abstract`'s dtype and sharding."""
    part = row[packed.offset : packed.offset + packed.num_bytes]
    array = part.view(jnp.dtype(packed.dtype)).reshape(packed.shape).astype(abstract.dtype)
    # A copy, since JAX on CPUs may use the memory of the array that it is given.
    return jax.make_array_from_callback(
        packed.shape, abstract.sharding, lambda where: array[where].copy()
    )
