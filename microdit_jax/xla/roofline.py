"""Lower bound of the time that a counted program takes on a chip: the roofline model.

A kernel takes the time of its operations at the chip's peak or of its bytes at the memory's
bandwidth, whichever is longer; a collective takes the time of its bytes over the links. Launches,
latency, and matmuls too small to fill the chip cost nothing here: real steps take longer.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
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
      exposed_inside, exposed_across: time in which kernels wait for them, by the order of the
        compiled program.
    """

    matmuls: float
    memory: float
    kernels: float
    inside: float
    across: float
    exposed_inside: float
    exposed_across: float

    @property
    def exposed(self) -> float:
        """Time in which kernels wait for collectives."""
        return self.exposed_inside + self.exposed_across

    @property
    def communication(self) -> float:
        """All collectives, one after the other."""
        return self.inside + self.across

    @property
    def lower_bound(self) -> float:
        """Step time in the order of the compiled program: all kernels, and what they wait for."""
        return self.kernels + self.exposed

    @property
    def without_overlap(self) -> float:
        """Step time if nothing overlaps."""
        return self.kernels + self.communication


@dataclasses.dataclass(frozen=True)
class CollectiveTime:
    """One collective's times, of all its runs together, in seconds.

    Attributes:
      seconds: its bytes over its link.
      beside: lower bound of the kernels that are scheduled between its start and its end.
      exposed: time in which kernels wait for it.
      across: True if it goes over the network between slices.
    """

    seconds: float
    beside: float
    exposed: float
    across: bool


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
    kernels, times = _kernel_seconds(counts, chip), collective_times(counts, chip, slices)

    def over(network: bool, seconds: Callable[[CollectiveTime], float]) -> float:
        return sum((seconds(time) for time in times if time.across == network), 0.0)

    return StepTime(
        matmuls=_matmul_seconds(counts.flops_by_type, chip),
        memory=counts.num_bytes / chip.memory_bandwidth,
        kernels=sum(kernels, 0.0),
        inside=over(False, lambda time: time.seconds),
        across=over(True, lambda time: time.seconds),
        exposed_inside=over(False, lambda time: time.exposed),
        exposed_across=over(True, lambda time: time.exposed),
    )


def collective_times(
    counts: Counts, chip: Chip, slices: Sequence[int]
) -> tuple[CollectiveTime, ...]:
    """Computes the time of each collective of a program, and how much of it kernels wait for."""
    kernels = _kernel_seconds(counts, chip)
    before = [0.0, *itertools.accumulate(kernels)]  # seconds of all kernels before each
    across = [is_across(c, slices) for c in counts.collectives]
    seconds = [
        c.times * c.num_bytes / (chip.network_bandwidth if crosses else chip.link_bandwidth)
        for c, crosses in zip(counts.collectives, across, strict=True)
    ]
    waited = waits(kernels, seconds, across, counts.collectives)
    return tuple(
        CollectiveTime(time, before[c.finished] - before[c.started], wait, crosses)
        for c, time, wait, crosses in zip(counts.collectives, seconds, waited, across, strict=True)
    )


def waits(
    kernels: Sequence[float],
    communication: Sequence[float],
    across: Sequence[bool],
    collectives: Sequence[Collective],
) -> list[float]:
    """Computes how long kernels wait for each collective, in seconds.

    Kernels run one after the other in the order of the program. Beside them run collectives, each
    from its start on; where its result is awaited, kernels wait for its end. Those over one link,
    that inside a slice or the network, run one after the other. What runs several times in a loop
    counts as stretched by that number.

    Args:
      kernels: seconds of each kernel, all runs together.
      communication: seconds of each of the collectives, all runs together.
      across: True for those over the network.
    """
    events = sorted(
        (kernel, number, i, is_end)
        for i, c in enumerate(collectives)
        for kernel, number, is_end in (
            (c.started, c.order[0], False),
            (c.finished, c.order[1], True),
        )
    )
    before = [0.0, *itertools.accumulate(kernels)]  # seconds of all kernels before each
    total, free = 0.0, {False: 0.0, True: 0.0}
    finish, waited = [0.0] * len(collectives), [0.0] * len(collectives)
    for kernel, _, i, is_end in events:
        now = before[kernel] + total
        if is_end:
            waited[i] = max(0.0, finish[i] - now)
            total += waited[i]
        else:
            free[across[i]] = finish[i] = max(now, free[across[i]]) + communication[i]
    return waited


def _kernel_seconds(counts: Counts, chip: Chip) -> list[float]:
    """Computes the time of each kernel, all its runs together."""
    return [
        k.times * max(_matmul_seconds(k.flops, chip), k.num_bytes / chip.memory_bandwidth)
        for k in counts.kernels
    ]


def _matmul_seconds(flops: Mapping[str, float], chip: Chip) -> float:
    seconds = (n / (chip.bfloat16_flops * RATE.get(t, OTHER_RATE)) for t, n in flops.items())
    return sum(seconds, 0.0)


def is_across(found: Collective, slices: Sequence[int]) -> bool:
    """True if a collective's group has devices of several slices."""
    return len({slices[device] for device in found.devices}) > 1
