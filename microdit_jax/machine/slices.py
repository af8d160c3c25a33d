"""Slices: groups of devices with fast links inside, joined by a slower network.

A slice is what JAX calls one: the chips of a TPU slice (their links are ICI, the network between
slices is DCN), and on GPUs those of one NVLink domain, which is a node or a rack (the network
between them is InfiniBand or Ethernet).
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh
from jaxtyping import Shaped

ACROSS = ("data", "slices")  # axes of a mesh that are meant to go across slices


def slice_of(device: Any) -> int:
    """Returns the slice that a device is in; 0 where the platform knows of none, as CPUs."""
    index, coords = getattr(device, "slice_index", None) or 0, getattr(device, "coords", ())
    if device.platform == "gpu" and len(coords) == 3:
        # Of a GPU that is only compiled for, slice_index is 0 everywhere; coords are its slice, its
        # host and its number.
        return index or int(coords[0])
    return index


def arrange(devices: Sequence[Any], sizes: Sequence[int]) -> Shaped[np.ndarray, "..."]:
    """Arranges devices in a mesh whose first axis goes across slices, and the others within one.

    `jax.make_mesh` refuses devices of several slices. Inside a slice the order is JAX's own, which
    follows a TPU's links. Where the other axes do not fit into every slice, they go on in the next
    one, slice by slice and by the devices' numbers (`crossing` names them).

    Args:
      devices: of one platform.
      sizes: of the mesh's axes; their product is the number of devices.
    Returns:
      The devices as an array of these sizes.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    if len(slices) == 1:
        return _within_a_slice(devices, sizes)
    groups = [sorted(slices[number], key=lambda device: device.id) for number in sorted(slices)]
    inner = math.prod(sizes[1:])
    if any(len(group) % inner for group in groups):
        return np.array([device for group in groups for device in group], object).reshape(sizes)
    parts = [_within_a_slice(group, (len(group) // inner, *sizes[1:])) for group in groups]
    return np.concatenate(parts)


def _within_a_slice(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    # As jax.make_mesh does it: TPU v5e lacks links that the torus of others has.
    split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)


def crossed(devices: Sequence[Any], fsdp: int, expert: int) -> int:
    """Returns over how many slices fsdp must go, the fewest that divide it; 1 where it needs not.

    It is 1 as well where even so the other devices of the two axes would not fit into a slice.
    """
    sizes = collections.Counter(map(slice_of, devices)).values()
    for across in range(1, fsdp + 1):
        if fsdp % across == 0 and not any(size % (fsdp // across * expert) for size in sizes):
            return across
    return 1


def slices_of(mesh: Mesh) -> tuple[int, ...]:
    """Returns the slice of each of the mesh's devices, in the order that collectives count them."""
    return tuple(slice_of(device) for device in mesh.devices.flat)


def crossing(mesh: Mesh) -> list[str]:
    """Names the axes meant for the inside of a slice whose neighbours lie in different ones."""
    slices = np.reshape(slices_of(mesh), mesh.devices.shape)
    return [
        name
        for axis, name in enumerate(mesh.axis_names)
        if name not in ACROSS and (slices != slices.take([0], axis)).any()
    ]


def crossing_warning(mesh: Mesh, num_bytes: int) -> str:
    """Returns a line about the price of `crossing`; "" where no axis does.

    Args:
      num_bytes: size of the weights, of one copy.
    """
    names = crossing(mesh)
    if not names:
        return ""
    sizes = collections.Counter(slices_of(mesh)).values()
    axes = " and ".join(f"{name}={mesh.shape[name]}" for name in names)
    return (
        f"the mesh's {axes} cross slices of {min(sizes)} devices: in each step every device "
        f"receives up to {num_bytes / 1e9:.2f} GB of weights and as much of gradients over the "
        f"network between slices, and not over the links inside; choose axes fsdp and expert whose "
        f"product divides {math.gcd(*sizes)}, and let data cross"
    )


def described() -> str:
    """Describes the slices of this job's devices: ", 2 slices of 8"; "" where there is one."""
    counts = collections.Counter(map(slice_of, jax.devices()))
    if len(counts) == 1:
        return ""
    each = sorted(set(counts.values()))
    return f", {len(counts)} slices of {' to '.join(map(str, (each[0], each[-1])[: len(each)]))}"
