"""The least time that a counted program can take on a chip.

Each kernel takes as long as its operations at the chip's peak or its bytes at the memory's
bandwidth, whichever is more; exchanges take their bytes over the links. Nothing is charged for
launches, latency, or products too small to fill the chip: it is a bound, no forecast.
"""

import dataclasses
from collections.abc import Mapping

from microdit_jax.machine.chips import Chip
from microdit_jax.xla.hlo.count import Counts
from microdit_jax.xla.topologies import GPUS_PER_HOST, Topology

# float32 products run at half of bfloat16's rate: TF32 on H100, several passes on TPUs.
RATE = {"bf16": 1.0, "f16": 1.0, "f8e4m3fn": 2.0, "f8e5m2": 2.0}
OTHER_RATE = 0.5


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds of one run on each device.

    compute, memory, exchange: all operations, bytes and exchanges at their peaks, each alone.
    kernels: the sum over kernels of the larger of the first two.
    """

    compute: float
    memory: float
    kernels: float
    exchange: float

    @property
    def hidden(self) -> float:
        """If exchanges run while kernels do."""
        return max(self.kernels, self.exchange)

    @property
    def exposed(self) -> float:
        """If they do not."""
        return self.kernels + self.exchange


def bound(counts: Counts, topology: Topology) -> Bound:
    """The bound of a program on a topology whose chip is known."""
    chip = topology.chip
    kernels = (
        k.times * max(_compute(k.flops, chip), k.num_bytes / chip.memory_bandwidth)
        for k in counts.kernels
    )
    exchanges = (
        c.times * c.num_bytes / _bandwidth(c.devices, topology, chip) for c in counts.collectives
    )
    return Bound(
        _compute(counts.flops_by_type, chip),
        counts.num_bytes / chip.memory_bandwidth,
        sum(kernels, 0.0),
        sum(exchanges, 0.0),
    )


def _compute(flops: Mapping[str, float], chip: Chip) -> float:
    seconds = (n / (chip.bfloat16_flops * RATE.get(t, OTHER_RATE)) for t, n in flops.items())
    return sum(seconds, 0.0)


def _bandwidth(devices: tuple[int, ...], topology: Topology, chip: Chip) -> float:
    """Of the links that a group's exchange must take: the network's if it spans hosts."""
    if topology.hosts == 1 or len({device // GPUS_PER_HOST for device in devices}) == 1:
        return chip.link_bandwidth
    return chip.network_bandwidth
