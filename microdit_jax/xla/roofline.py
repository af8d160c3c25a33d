"""Lower bound of the time that a counted program takes on a chip: the roofline model.

A kernel takes the time of its operations at the chip's peak or of its bytes at the memory's
bandwidth, whichever is longer; a collective takes the time of its bytes over the links. Launches,
latency, and matmuls too small to fill the chip cost nothing here: real steps take longer.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from microdit_jax.machine.chips import Chip
from microdit_jax.xla.hlo.collectives import Collective
from microdit_jax.xla.hlo.count import Counts
from microdit_jax.xla.topologies import GPUS_PER_HOST, Topology

# Rates over bfloat16's. float32 matmuls run at half of it: TF32 on H100, several passes on TPUs.
RATE = {"bf16": 1.0, "f16": 1.0, "f8e4m3fn": 2.0, "f8e5m2": 2.0}
OTHER_RATE = 0.5


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Lower bounds of one run on each device, in seconds.

    Attributes:
      matmuls: all matmul operations at the chip's peak.
      memory: all bytes at the memory's bandwidth.
      kernels: sum over kernels of the longer of the two.
      communication: all collectives at the links' bandwidth, one after the other.
      exposed: time in which kernels wait for collectives, by the order of the compiled program.
    """

    matmuls: float
    memory: float
    kernels: float
    communication: float
    exposed: float

    @property
    def lower_bound(self) -> float:
        """Step time if kernels hide all communication, or communication all kernels."""
        return max(self.kernels, self.communication)

    @property
    def without_overlap(self) -> float:
        """Step time if nothing overlaps."""
        return self.kernels + self.communication


def step_time(counts: Counts, topology: Topology) -> StepTime:
    """Computes the lower bounds of a program on a topology.

    Raises:
      ValueError: the peaks of the topology's chip are not known.
    """
    chip = topology.chip
    if chip is None or not chip.memory_bandwidth:
        raise ValueError(f"expected a chip whose peaks are known, found {topology.name}")
    kernels = [
        k.times * max(_matmul_seconds(k.flops, chip), k.num_bytes / chip.memory_bandwidth)
        for k in counts.kernels
    ]
    communication = [
        c.times * c.num_bytes / _bandwidth(c.devices, topology, chip) for c in counts.collectives
    ]
    return StepTime(
        matmuls=_matmul_seconds(counts.flops_by_type, chip),
        memory=counts.num_bytes / chip.memory_bandwidth,
        kernels=sum(kernels, 0.0),
        communication=sum(communication, 0.0),
        exposed=exposed(kernels, communication, counts.collectives),
    )


def exposed(
    kernels: Sequence[float], communication: Sequence[float], collectives: Sequence[Collective]
) -> float:
    """Computes the time that kernels wait for collectives.

    Kernels run one after the other in the order of the program. Beside them collectives run one
    after the other, each from its start on; where its result is awaited, kernels wait for its end.
    What runs several times in a loop counts as stretched by that number.

    Args:
      kernels: seconds of each kernel, all runs together.
      communication: seconds of each of the collectives, all runs together.
    """
    starts, ends = collections.defaultdict(list), collections.defaultdict(list)
    for i, found in enumerate(collectives):
        starts[found.started].append(i)
        ends[found.finished].append(i)
    now = links_free = waited = 0.0
    finish = [0.0] * len(collectives)
    for k in range(len(kernels) + 1):
        for i in starts[k]:
            links_free = finish[i] = max(now, links_free) + communication[i]
        for i in ends[k]:
            waited += max(0.0, finish[i] - now)
            now = max(now, finish[i])
        now += kernels[k] if k < len(kernels) else 0.0
    return waited


def _matmul_seconds(flops: Mapping[str, float], chip: Chip) -> float:
    seconds = (n / (chip.bfloat16_flops * RATE.get(t, OTHER_RATE)) for t, n in flops.items())
    return sum(seconds, 0.0)


def _bandwidth(devices: Sequence[int], topology: Topology, chip: Chip) -> float:
    """Returns the links' bandwidth, or the network's for a group that spans hosts."""
    if topology.hosts == 1 or len({device // GPUS_PER_HOST for device in devices}) == 1:
        return chip.link_bandwidth
    return chip.network_bandwidth
