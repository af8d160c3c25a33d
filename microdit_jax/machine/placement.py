"""Puts the rows of a batch on the devices that hold the weights."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, Shaped

from microdit_jax.errors import UserError, visible


def mesh_of(params: Any) -> Mesh | None:
    """Returns the mesh that weights are on; None for a single device's and for NumPy arrays."""
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
        assert isinstance(leaf.sharding.mesh, Mesh)  # not an abstract one: the weights exist
        return leaf.sharding.mesh
    return None


def rows_sharding(params: Any) -> tuple[Sharding, int]:
    """Returns the sharding of a batch's leading axis, and the divisor of its number of rows.

    Args:
      params: weights. On a mesh, rows are spread over all of its devices, whether the weights are
        copied or split there.
    """
    if (mesh := mesh_of(params)) is not None:
        return NamedSharding(mesh, P(mesh.axis_names)), mesh.size
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, jax.Array):
        return leaf.sharding, 1
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), 1


def put_rows(rows: Shaped[np.ndarray, "n ..."], sharding: Sharding) -> Shaped[jax.Array, "n ..."]:
    """Puts rows on devices by `rows_sharding`; each process puts those of its own devices.

    jax.device_put would compare all rows between processes, and end the program if two hosts
    rounded a caption's embedding differently.
    """
    return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)


def fetch(array: Shaped[jax.Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """Copies a whole array to this host's memory, even if other hosts hold parts of it."""
    if not array.is_fully_addressable:
        assert isinstance(array.sharding, NamedSharding)  # as all of this project's are
        array = _everywhere(array.sharding.mesh)(array)
    return np.asarray(array)


@functools.cache
def _everywhere(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


# ------------------------------------------------------------------ batches of one size
class FullBatch(NamedTuple):
    """One batch of a fixed size out of more rows, or fewer.

    rows: which rows it holds, (size,) indices. count: how many of them, from the front, are new;
    the others repeat these to fill the batch up, and their results are to be thrown away.
    """

    rows: Int[np.ndarray, " size"]
    count: int


def full_batches(count: int, size: int) -> Iterator[FullBatch]:
    """Splits `count` rows into batches of exactly `size`, so that all run one compiled program."""
    for start in range(0, count, size):
        new = np.arange(start, min(start + size, count))
        yield FullBatch(np.resize(new, size), len(new))


def round_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def map_batches(
    function: Callable[..., Any],
    params: Any,
    items: Sequence[Any] | Shaped[np.ndarray, "n ..."],
    prepare: Callable[[Any], Shaped[np.ndarray, "m ..."] | tuple[Shaped[np.ndarray, "m ..."], ...]],
    *,
    size: int,
) -> Any:
    """Applies function(params, *arrays) to all items, in full batches on the weights' devices.

    Args:
      function: jitted; its outputs have a row for each item of the batch.
      params: weights; where they are decides where the batches go (`rows_sharding`).
      items: one or more.
      prepare: turns a slice of the items into the function's arrays, a row for each item.
      size: items at a time, rounded up to the number of devices.
    Returns:
      The function's outputs for all items, as NumPy arrays.
    Raises:
      UserError: the weights are not of the network that the function applies.
    """
    sharding, devices = rows_sharding(params)
    outputs = []
    for batch in full_batches(len(items), round_up(size, devices)):
        start = int(batch.rows[0])
        arrays = prepare(items[start : start + batch.count])
        arrays = arrays if isinstance(arrays, tuple) else (arrays,)
        placed = [put_rows(array[batch.rows - start], sharding) for array in arrays]
        try:
            out = function(params, *placed)
        except (ScopeParamShapeError, ScopeParamNotFoundError) as error:
            raise UserError(
                f"expected the weights that a model's config.json describes, found others "
                f"({visible(error, 200)}); convert the checkpoint again"
            ) from error
        outputs.append(jax.tree.map(lambda part, n=batch.count: fetch(part)[:n], out))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)
