"""Lower bounds of the step time: peaks, bandwidths, and what a schedule hides."""

import dataclasses

import pytest

from microdit_jax.machine.chips import chip_of
from microdit_jax.xla import roofline
from microdit_jax.xla.hlo.collectives import Collective
from microdit_jax.xla.hlo.count import Counts, Kernel
from microdit_jax.xla.topologies import Topology

H100 = Topology("h100:16", "cuda", tuple(range(16)), chip_of("NVIDIA H100 80GB HBM3"), 2)
COUNTS = Counts(
    kernels=(
        Kernel("matmul", "dot", "", 2, {"bf16": 989e9}, 335e6),  # 1 ms of matmul, 0.1 of memory
        Kernel("sum", "fusion", "", 3, {}, 3.35e9),  # 1 ms of memory
    ),
    collectives=(
        Collective("all-gather", 2, 450e6, tuple(range(8)), {}, ()),  # 1 ms within a host
        Collective("all-reduce", 3, 50e6, (0, 8), {}, ()),  # 1 ms between hosts
    ),
    uncounted={},
)


def test_step_time():
    time = roofline.step_time(COUNTS, H100)
    assert time.matmuls == pytest.approx(2e-3) and time.memory == pytest.approx(3.2e-3)
    assert time.kernels == pytest.approx(5e-3) and time.communication == pytest.approx(5e-3)
    assert time.lower_bound == pytest.approx(5e-3)
    assert time.without_overlap == pytest.approx(10e-3)
    assert time.exposed == pytest.approx(5e-3)  # the program waits for each at once


def test_float32_matmuls_take_twice_the_time():
    kernels = (dataclasses.replace(COUNTS.kernels[0], flops={"f32": 989e9}),)
    time = roofline.step_time(dataclasses.replace(COUNTS, kernels=kernels), H100)
    assert time.matmuls == time.kernels == pytest.approx(4e-3)


def test_unknown_peaks_are_refused():
    with pytest.raises(ValueError, match="expected a chip whose peaks are known, found cpu:8"):
        roofline.step_time(COUNTS, Topology("cpu:8", "cpu", tuple(range(8)), None, 1))


def collective(started: int, finished: int) -> Collective:
    return Collective("all-gather", 1, 1.0, (0, 1), {}, (), started, finished)


@pytest.mark.parametrize(
    "kernels, seconds, spans, expected",
    [
        ([4.0], [3.0], [(0, 0)], 3.0),  # awaited at once
        ([4.0], [3.0], [(0, 1)], 0.0),  # hidden by the kernel
        ([4.0], [3.0], [(1, 1)], 3.0),  # after the last kernel
        ([2.0, 2.0], [3.0], [(0, 1)], 1.0),  # hidden in part
        ([4.0, 1.0], [3.0, 3.0], [(0, 1), (0, 2)], 1.0),  # the links carry one after the other
        ([4.0, 1.0], [3.0, 3.0], [(0, 1), (1, 2)], 2.0),  # they were idle before the second
        ([2.0, 5.0], [3.0, 3.0], [(0, 1), (1, 2)], 1.0),  # waiting delays what follows
    ],
)
def test_what_a_schedule_does_not_hide(kernels, seconds, spans, expected):
    found = roofline.exposed(kernels, seconds, [collective(*span) for span in spans])
    assert found == pytest.approx(expected)
