"""A state as its checkpoint stores it: large arrays one by one, small ones packed together.

Orbax takes about 1.5 ms of processor time for each array, however small (measured). A small
network's state is hundreds of small arrays, a large one's has hundreds beside its matrices. So
those are stored as a few rows of bytes, one for each of the state's fields: "packed/params",
"packed/ema", ... An index in the checkpoint's own metadata says what is where.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from microdit_jax.trees import flatten, unflatten

SMALL = 2**20  # bytes; writing this many takes about as long as Orbax takes for an array
PACKED = "packed"


class Packed(NamedTuple):
    """Where a small array is: its type and shape, and its first byte in its field's row."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Of the array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def pack(state: Any, memory: dict[str, np.ndarray] | None = None) -> tuple[dict, dict[str, dict]]:
    """What to store, and the index of what it packs.

    Args:
      state: tree of jax arrays. Of several processes each must call; an array is packed if each
        of them has the whole of it.
      memory: rows (b,) of bytes of an earlier call, which are written over, and then this call's.
        New memory takes the system many times as long to give as it takes to copy to (measured).
    Returns:
      Nested dictionaries: large arrays as they are, rows of bytes as uint8 NumPy arrays, copied,
      so that the state may be donated. The index as JSON can hold it, for `read_index`.
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
    """The index that `pack` made; empty for a checkpoint that packs nothing."""
    return {
        path: Packed(dtype, tuple(shape), offset)
        for path, (dtype, shape, offset) in (metadata or {}).get(PACKED, {}).items()
    }


def row_of(path: str) -> str:
    """Where the array of this path is packed: with the others of the state's field."""
    return f"{PACKED}/{path.split('/')[0]}"


def rows_of(paths: Iterable[str]) -> set[str]:
    """The rows that hold these."""
    return {row_of(path) for path in paths}


def unpack(
    row: UInt8[np.ndarray, " b"], place: Packed, abstract: jax.ShapeDtypeStruct
) -> Shaped[jax.Array, "..."]:
    """One array of a row of bytes, with `abstract`'s type and sharding."""
    part = row[place.offset : place.offset + place.num_bytes]
    array = part.view(jnp.dtype(place.dtype)).reshape(place.shape).astype(abstract.dtype)
    # Contiguous and its own: on CPUs JAX may use the memory as it is.
    return jax.make_array_from_callback(
        place.shape, abstract.sharding, lambda where: array[where].copy()
    )
