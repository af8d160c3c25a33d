"""Devices of machines that are not here, with the attributes that real ones carry."""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class StandInDevice:
    """What a mesh reads of a device; `coords` and `core_on_chip` are a TPU's."""

    id: int
    slice_index: int | None
    process_index: int
    platform: str
    device_kind: str
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def gpus(nodes: int, each: int, *, first_id: int = 0) -> list[StandInDevice]:
    """Nodes of GPUs; to JAX each node is a slice."""
    return [
        StandInDevice(first_id + i, i // each, i // each, "gpu", "NVIDIA H100 80GB HBM3")
        for i in range(nodes * each)
    ]


def tpus(slices: int, shape: tuple[int, int] = (4, 4)) -> list[StandInDevice]:
    """Slices of TPU v5e, whose chips lie in a plane; four chips are a host."""
    coords = [(x, y, 0) for y, x in itertools.product(range(shape[1]), range(shape[0]))]
    count = len(coords)
    return [
        StandInDevice(s * count + i, s, (s * count + i) // 4, "tpu", "TPU v5 lite", at)
        for s in range(slices)
        for i, at in enumerate(coords)
    ]
