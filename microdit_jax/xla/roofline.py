"""Lower bound of the time that a counted program takes on a chip: the roofline model.

A kernel takes the time of its operations at the chip's peak or of its bytes at the memory's
bandwidth, whichever is longer; a collective takes the time of its bytes over the links. Launches,
latency, and matmuls too small to fill the chip cost nothing here: real steps take longer.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from microdit_jax.machine.chips import Chip
from microdit_jax.xla.hlo.collectives import Collective
from microdit_jax.xla.hlo.count import Counts

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
      inside: collectives within a slice at its links' bandwidth, one after the other.
      across: collectives between slices at the network's bandwidth, one after the other.
      exposed: time in which kernels wait for collectives, by the order of the compiled program.
    """

    matmuls: float
    memory: float
    kernels: float
    inside: float
    across: float
    exposed: float

    @property
    def communication(self) -> float:
        """All collectives, one after the other."""
        return self.inside + self.across

    @property
    def lower_bound(self) -> float:
        """Step time if kernels hide all communication, or communication all kernels."""
        return max(self.kernels, self.communication)

    @property
    def without_overlap(self) -> float:
        """Step time if nothing overlaps."""
        return self.kernels + self.communication


def is_known(chip: Chip | None, slices: Sequence[int]) -> TypeGuard[Chip]:
    """True if all rates are known that `step_time` needs."""
    network = chip is not None and (len(set(slices)) == 1 or chip.network_bandwidth > 0)
    return network and chip is not None and chip.memory_bandwidth > 0


def step_time(counts: Counts, chip: Chip, slices: Sequence[int]) -> StepTime:
    """Computes the lower bounds of a program on each of some chips.

    Args:
      chip: one that `is_known`.
      slices: slice of each device, in the mesh's order, by which collectives name devices.
    """
    kernels = [
        k.times * max(_matmul_seconds(k.flops, chip), k.num_bytes / chip.memory_bandwidth)
        for k in counts.kernels
    ]
    across = [is_across(c, slices) for c in counts.collectives]
    communication = [
        c.times * c.num_bytes / (chip.network_bandwidth if crosses else chip.link_bandwidth)
        for c, crosses in zip(counts.collectives, across, strict=True)
    ]
    total = sum(communication, 0.0)
    between = sum((t for t, crosses in zip(communication, across, strict=True) if crosses), 0.0)
    return StepTime(
        matmuls=_matmul_seconds(counts.flops_by_type, chip),
        memory=counts.num_bytes / chip.memory_bandwidth,
        kernels=sum(kernels, 0.0),
        inside=total - between,
        across=between,
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


def is_across(found: Collective, slices: Sequence[int]) -> bool:
    """True if a collective's group has devices of several slices."""
    return len({slices[device] for device in found.devices}) > 1
