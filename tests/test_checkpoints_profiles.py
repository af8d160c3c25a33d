"""Profiles of power-function averages against sums and integrals that are written out."""

import itertools

import numpy as np
import pytest
from conftest import relative_l2

from microdit_jax.checkpoints import profiles
from microdit_jax.checkpoints.profiles import Profile

LENGTHS = (0.02, 0.05, 0.1, 0.2, 0.28)


def densities(made, t):
    """Profiles at the times t, (n, times)."""
    rows = []
    for step, g in made:
        inside = np.where(t <= step, t / step, 0.0)
        rows.append((g + 1) * inside**g * (t <= step) / step)
    return np.array(rows)


def step_weights(step: int, exponent: float) -> np.ndarray:
    """The weight of each step in an average, which the recursion of equation 2 multiplies up."""
    weights = np.zeros(step)
    for t in range(1, step + 1):
        beta = (1 - 1 / t) ** (exponent + 1)
        weights *= beta
        weights[t - 1] += 1 - beta
    return weights


def snapshots(count: int, last: int) -> list[Profile]:
    every = last // count
    made = itertools.product(range(every, last + 1, every), profiles.LENGTHS)
    return [Profile(step, profiles.exponent(length)) for step, length in made]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_length_is_the_deviation_of_the_profile(length):
    weights, t = step_weights(4000, profiles.exponent(length)), np.arange(1, 4001) / 4000
    mean = weights @ t
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert np.sqrt(weights @ (t - mean) ** 2) == pytest.approx(length, rel=1e-3)


def test_the_plain_mean_is_the_longest():
    assert profiles.exponent(profiles.LONGEST) == pytest.approx(0, abs=1e-9)
    assert profiles.exponent(0.2886) < 0.01


def test_inner_products_are_integrals():
    made = [Profile(t, profiles.exponent(s)) for t, s in zip((3, 5, 8, 8), LENGTHS, strict=False)]
    edges = np.linspace(0, 8, 200_001)
    t = (edges[:-1] + edges[1:]) / 2
    rows = densities(made, t)
    np.testing.assert_allclose(
        profiles.inner_products(made, made), rows @ rows.T * (t[1] - t[0]), rtol=1e-5
    )


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15])
def test_the_combination_is_the_least_squares_one(length):
    """On a grid of times, with the constraint eliminated by hand."""
    made, wanted = snapshots(6, 60), Profile(60, profiles.exponent(length))
    edges = np.linspace(0, 60, 60_001)
    t = (edges[:-1] + edges[1:]) / 2
    rows, target = densities(made, t).T, densities([wanted], t)[0]
    free, *_ = np.linalg.lstsq(rows[:, :-1] - rows[:, -1:], target - rows[:, -1], rcond=None)
    expected = np.append(free, 1 - free.sum())
    found, misfit = profiles.combination(made, wanted)
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert relative_l2(rows @ found, rows @ expected) < 1e-5
    assert misfit == pytest.approx(relative_l2(rows @ found, target), rel=1e-3)


def test_tracked_lengths_come_back_as_they_are():
    made = snapshots(8, 80)
    for number, length in enumerate(profiles.LENGTHS):
        found, misfit = profiles.combination(made, Profile(80, profiles.exponent(length)))
        np.testing.assert_allclose(found, np.eye(16)[14 + number], atol=1e-6)
        assert misfit < 1e-6


def test_an_average_of_a_path_is_made_from_snapshots_of_two_others():
    """A random walk with a drift: near enough with a few snapshots, nearer with more."""
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(size=(640, 50)), 0) + np.sqrt(np.arange(640))[:, None]
    wanted = Profile(640, profiles.exponent(0.07))
    expected = step_weights(640, wanted.exponent) @ path
    errors = []
    for count in (4, 16, 64):
        made = snapshots(count, 640)
        averages = [step_weights(int(t), g) @ path[: int(t)] for t, g in made]
        weights, _ = profiles.combination(made, wanted)
        errors.append(relative_l2(weights @ averages, expected))
    assert errors[0] < 1e-2 and errors[1] < 2e-3 and errors[2] < 2e-4, errors


def test_what_snapshots_can_make():
    """Eight snapshots make what lies between the tracked lengths, and some more on either side."""
    low, high = profiles.within_reach(snapshots(8, 80), 80)
    assert 0.02 < low < 0.05 and 0.1 < high < profiles.LONGEST
    assert profiles.combination(snapshots(8, 80), Profile(80, profiles.exponent(0.01)))[1] > 0.5
