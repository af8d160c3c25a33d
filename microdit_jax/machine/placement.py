"""Where the rows of a batch go: to the devices that hold the weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Shaped


def rows_sharding(params: Any) -> tuple[Sharding, int]:
    """The sharding of a batch's leading axis, and the number that its rows must divide by.

    Args:
      params: weights; on a mesh, rows are dealt out over all of its devices, whether the weights
        are copied or split there.
    """
    leaf = jax.tree.leaves(params)[0]
    if not isinstance(leaf, jax.Array):
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), 1
    if isinstance(leaf.sharding, NamedSharding):
        mesh = leaf.sharding.mesh
        return NamedSharding(mesh, P(mesh.axis_names)), mesh.size
    return leaf.sharding, 1


def put_rows(rows: Shaped[np.ndarray, "n ..."], place: Sharding) -> Shaped[jax.Array, "n ..."]:
    """The rows where `rows_sharding` says; of several processes each puts its own devices' part.

    jax.device_put would compare all of them between processes, and end the program where two hosts
    rounded a caption's embedding differently.
    """
    return jax.make_array_from_callback(rows.shape, place, rows.__getitem__)


def fetch(array: Shaped[jax.Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """A whole array in this host's memory, also where other hosts hold parts of it."""
    if not array.is_fully_addressable:
        array = _everywhere(array.sharding.mesh)(array)
    return np.asarray(array)


@functools.cache
def _everywhere(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
