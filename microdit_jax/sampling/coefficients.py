"""Coefficients of one network evaluation: what a solver makes of noise levels."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Float64

OUTPUTS = 3  # of the network that an update combines: this evaluation's and two earlier ones'


class Update(NamedTuple):
    """Coefficients of x' = x + step (sum_j weights_j output_j - pull x), the newest output first.

    Attributes:
      step, pull: scalars, or (evaluations,) of several stacked.
      weights: (OUTPUTS,), or (evaluations, OUTPUTS).
    """

    step: Float[Array, "*n"]
    pull: Float[Array, "*n"]
    weights: Float[Array, "*n outputs"]


class Evaluation(NamedTuple):
    """Coefficients of one evaluation, or of several stacked: the input of `evaluate`.

    Attributes:
      sigma: noise level at which the network is evaluated.
      keeps_denoised: the output that is kept and combined is the denoised D itself; otherwise it
        is the slope dx/dsigma.
      restarts: the step begins at the x that is evaluated; otherwise `corrector` computes its
        beginning from that of the step before.
      corrector, predictor: updates of x_start, and from there to the next evaluation's x.
    """

    sigma: Float[Array, "*n"]
    keeps_denoised: Bool[Array, "*n"]
    restarts: Bool[Array, "*n"]
    corrector: Update
    predictor: Update


def update(step: float, weights: list[float], pull: float = 0.0) -> Update:
    """Makes an update, its weights filled up with zeros."""
    padded = (*weights, 0.0, 0.0)[:OUTPUTS]
    return Update(_number(step), _number(pull), _number(padded))


def _number(value: float | tuple[float, ...]) -> Any:
    """Converts to float32 NumPy, which compiled programs take like JAX's arrays."""
    return np.float32(value) if isinstance(value, float) else np.array(value, np.float32)


STAY = update(0.0, [1.0])


def row(
    sigma: float,
    *,
    corrector: Update = STAY,
    predictor: Update = STAY,
    keeps_denoised: bool = False,
    restarts: bool = False,
) -> Evaluation:
    """Makes an evaluation at a noise level; arguments as `Evaluation` has them."""
    denoised: Any = np.bool_(keeps_denoised)
    begins: Any = np.bool_(restarts)
    return Evaluation(_number(sigma), denoised, begins, corrector, predictor)


def slope_row(sigma: float, step: float, weights: list[float]) -> Evaluation:
    """A step of dx/dsigma = slope from the x that is evaluated."""
    predictor = update(step, weights)
    return row(sigma, predictor=predictor, restarts=True)


def mean_weights(nodes: Float64[np.ndarray, " order"], low: float, high: float) -> list[float]:
    """Weights of the values at `nodes` in the mean of their polynomial over [low, high]."""
    middle, half = (low + high) / 2, (high - low) / 2
    points, quadrature = np.polynomial.legendre.leggauss(OUTPUTS)
    points = middle + half * points
    weights = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        basis = np.prod((points[:, None] - others) / (node - others), axis=1)  # (points,)
        weights.append(float(basis @ quadrature) / 2)
    return weights


def unified(h: float, ratios: list[float]) -> list[float]:
    """Solves R a = b of UniPC's equations 9 and 10 for B(h) = e^-h - 1, data prediction.

    Row k of R is r^k; b_k = k! phi_k(h) h / B(h), where phi_{k+1} = (phi_k - 1 / k!) / (-h).
    """
    order, B = len(ratios), np.expm1(-h)
    if order == 1:
        return [0.5]
    R = np.vander(ratios, order, increasing=True).T
    b, phi, factorial = [], np.expm1(-h) / -h - 1, 1.0
    for k in range(1, order + 1):
        b.append(phi * factorial / B)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return list(np.linalg.solve(R, b))
