"""Lower bounds of the step time: peaks, bandwidths, and what a schedule hides."""

import dataclasses

import pytest
from support.counted_program import CHIP, COUNTS, SLICES

from microdit_jax.machine.chips import chip_of
from microdit_jax.xla import roofline
from microdit_jax.xla.hlo.collectives import Collective


def test_step_time():
    time = roofline.step_time(COUNTS, CHIP, SLICES)
    assert time.matmuls == pytest.approx(2e-3) and time.memory == pytest.approx(3.2e-3)
    assert time.kernels == pytest.approx(5e-3) and time.communication == pytest.approx(5e-3)
    assert time.exposed == pytest.approx(5e-3)  # the program waits for each at once
    assert time.exposed_inside == pytest.approx(2e-3)
    assert time.exposed_across == pytest.approx(3e-3)
    assert time.lower_bound == time.without_overlap == pytest.approx(10e-3)


def test_float32_matmuls_take_twice_the_time():
    kernels = (dataclasses.replace(COUNTS.kernels[0], flops={"f32": 989e9}),)
    time = roofline.step_time(dataclasses.replace(COUNTS, kernels=kernels), CHIP, SLICES)
    assert time.matmuls == time.kernels == pytest.approx(4e-3)


def test_links_inside_a_slice_and_the_network_across():
    time = roofline.step_time(COUNTS, CHIP, SLICES)
    assert time.inside == pytest.approx(2e-3) and time.across == pytest.approx(3e-3)
    # The order of the mesh decides, not the number of the device: here 0 and 8 share a node.
    time = roofline.step_time(COUNTS, CHIP, (0, 1) * 8)
    assert time.inside == pytest.approx(3 * 50e6 / 450e9)
    assert time.across == pytest.approx(2 * 450e6 / 50e9)


def test_unknown_rates_give_no_times():
    assert roofline.is_known(CHIP, SLICES) and not roofline.is_known(None, SLICES)
    v5p = chip_of("TPU v5p")  # the network between its slices was not looked up
    assert roofline.is_known(v5p, (0, 0)) and not roofline.is_known(v5p, (0, 1))


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
    across = [False] * len(spans)
    found = roofline.waits(kernels, seconds, across, [collective(*span) for span in spans])
    assert sum(found) == pytest.approx(expected)


def test_the_network_carries_beside_the_links():
    """One collective over each, both beside the first kernel: the longer of the two waits."""
    collectives = [collective(0, 1), collective(0, 1)]
    found = roofline.waits([4.0, 1.0], [3.0, 5.0], [False, True], collectives)
    assert found == [0.0, pytest.approx(1.0)]
    # One that is awaited before the other starts, without a kernel between them
    turns = [dataclasses.replace(collective(0, 0), order=(n, n)) for n in (0, 1)]
    assert roofline.waits([4.0], [3.0, 5.0], [False, True], turns) == [3.0, 5.0]
    found = roofline.waits([4.0, 1.0], [3.0, 5.0], [True, True], collectives)
    assert found == [0.0, pytest.approx(4.0)]
    # The second begins before the wait for the first, which hides a part of it as kernels do.
    turns = [
        dataclasses.replace(collective(0, 0), order=(1, 2)),
        dataclasses.replace(collective(0, 1), order=(0, 3)),
    ]
    assert roofline.waits([4.0], [3.0, 9.0], [False, True], turns) == [3.0, pytest.approx(2.0)]


def test_each_collective_against_the_kernels_beside_it():
    """The first starts before the first kernel and ends after it, the second waits at once."""
    spans = (0, 1), (2, 2)
    collectives = tuple(
        dataclasses.replace(c, started=started, finished=finished)
        for c, (started, finished) in zip(COUNTS.collectives, spans, strict=True)
    )
    counts = dataclasses.replace(COUNTS, collectives=collectives)
    first, second = roofline.collective_times(counts, CHIP, SLICES)
    assert (first.across, second.across) == (False, True)
    assert first.seconds == first.beside == pytest.approx(2e-3)
    assert first.exposed == pytest.approx(0) and second.beside == 0
    assert second.seconds == second.exposed == pytest.approx(3e-3)
    time = roofline.step_time(counts, CHIP, SLICES)
    assert time.exposed == pytest.approx(3e-3) and time.lower_bound == pytest.approx(8e-3)
