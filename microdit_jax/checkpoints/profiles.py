"""Averages of weights by a power function, and one of any length out of snapshots of others.

EDM2 (Karras et al. 2023, arXiv 2312.02696), section 3. An average at step t of the weights w gives
those of step k a weight that grows with a power of k, its profile (section 3.1, equation 1):

  average(t) = integral of p(k) w(k) dk,   p(k) = (g + 1) k^g / t^(g + 1) for 0 <= k <= t, else 0

Its length sigma_rel is the standard deviation of the profile over t (equation 3). Two lengths are
tracked while a run trains, and snapshots of both are kept. Afterwards the average of another length
is the sum of snapshots whose profiles come nearest to its own (section 3.2 and appendix C).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

LENGTHS = (0.05, 0.10)  # sigma_rel of the averages that are tracked, as in the paper
LONGEST = 12**-0.5  # sigma_rel of the plain mean of all steps
MISFIT = 0.1  # largest distance of a profile to the one asked for, relative (L2)


class Profile(NamedTuple):
    """The profile of an average: the step t that it ends at, and its exponent g."""

    step: int
    exponent: float


def exponent(length: float) -> float:
    """Returns the exponent g of a length sigma_rel, up to LONGEST.

    Equation 3, sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)), is a cubic equation in g.
    """
    inverse = float(length) ** -2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots[np.abs(roots.imag) < 1e-6].real.max()))


def inner_products(
    some: Sequence[Profile], others: Sequence[Profile]
) -> Float64[np.ndarray, "n m"]:
    """Integrates the product of each pair of profiles: what the least squares are made of."""
    t, g = (np.array(values, np.float64)[:, None] for values in zip(*some, strict=True))
    s, h = (np.array(values, np.float64)[None, :] for values in zip(*others, strict=True))
    # (g+1) (h+1) / (g+h+1) min(t,s)^(g+h+1) / (t^(g+1) s^(h+1)), without large powers.
    last = np.maximum(t, s)
    ratio = (np.minimum(t, s) / last) ** np.where(t < s, h, g)
    return (g + 1) * (h + 1) / (g + h + 1) * ratio / last


def combination(
    snapshots: Sequence[Profile], wanted: Profile
) -> tuple[Float64[np.ndarray, " n"], float]:
    """Finds the sum of snapshots that comes nearest to an average.

    The weights sum to 1 (a Lagrange multiplier; the paper's do so nearly): here the size of a
    network's weights matters.

    Returns:
      The weight of each snapshot, and the relative L2 distance of the sum's profile to the wanted.
    """
    n = len(snapshots)
    a = inner_products(snapshots, snapshots)
    b = inner_products(snapshots, [wanted])[:, 0]
    square = inner_products([wanted], [wanted]).item()
    system = np.ones((n + 1, n + 1))
    system[:n, :n], system[n, n] = a / square, 0.0
    weights = np.linalg.lstsq(system, np.append(b / square, 1.0), rcond=1e-13)[0][:n]
    residual = 1.0 - 2.0 * (b @ weights) / square + weights @ a @ weights / square
    return weights, float(np.sqrt(max(residual, 0.0)))


def within_reach(snapshots: Sequence[Profile], step: int) -> tuple[float, float]:
    """Returns the shortest and the longest of the averages up to a step that snapshots can make."""
    found = [
        length
        for length in np.arange(5, 285, 5) / 1000
        if combination(snapshots, Profile(step, exponent(length)))[1] <= MISFIT
    ]
    return float(min(found)), float(max(found))
