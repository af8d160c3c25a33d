"""Schedules: the noise levels at which a solver evaluates the network, from sigma_max to 0."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

from microdit_jax.diffusion import EdmConfig

LOG_KNEE = 0.02  # noise level around which the log schedule turns from geometric to even steps
MIDDLE = 0.8  # noise level around which the dense schedule has more levels than the log schedule
DENSITY = 4.0  # how many more
STUDENT_SPAN = 10.0, 0.2  # noise levels between which a student's later evaluations are

Levels = Float64[np.ndarray, " levels"]


def edm_levels(num_steps: int, config: EdmConfig) -> Levels:
    """Noise levels even in sigma^(1 / rho), from sigma_max to sigma_min, then 0 (EDM, equation 5).

    Returns:
      (num_steps + 1,) float64.
    """
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    ramp = np.arange(num_steps, dtype=np.float64) / max(num_steps - 1, 1)
    return np.append((high + ramp * (low - high)) ** config.rho, 0.0)


def log_levels(num_steps: int, config: EdmConfig) -> Levels:
    """Noise levels even in log(1 + sigma / LOG_KNEE), from sigma_max to 0.

    Far above the knee they fall by a constant factor, and below it by a constant difference, so the
    last step is no longer than the others: sigma_min has no part in it. On the instant model a
    multistep solver needs about half the evaluations on these levels that it needs on those of
    equation 5 (docs/sampling.md).

    Returns:
      (num_steps + 1,) float64.
    """
    levels = LOG_KNEE * np.expm1(
        np.linspace(np.log1p(config.sigma_max / LOG_KNEE), 0, num_steps + 1)
    )
    levels[0] = config.sigma_max
    return levels


def dense_levels(num_steps: int, config: EdmConfig) -> Levels:
    """Noise levels even in log(1 + sigma / LOG_KNEE) + DENSITY sigma / (sigma + MIDDLE), to 0.

    These are `log_levels` with up to twice as many per octave where images take shape, and fewer
    above, where the denoised image hardly changes. The constants were chosen on the instant model,
    by a grid search beside a fit of every level by gradient, which was no better
    (docs/sampling.md).

    Returns:
      (num_steps + 1,) float64.
    """
    top = np.full(num_steps + 1, config.sigma_max)
    wanted = dense_position(top) * np.linspace(1, 0, num_steps + 1)
    low, high = np.zeros(num_steps + 1), top.copy()
    for _ in range(100):  # bisection, to the last bit
        middle = (low + high) / 2
        below = dense_position(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    levels = high
    levels[[0, -1]] = config.sigma_max, 0.0
    return levels


def dense_position(level: Levels) -> Levels:
    """Returns where noise levels lie on the scale on which `dense_levels` are even, 0 for 0."""
    return np.log1p(level / LOG_KNEE) + DENSITY * level / (level + MIDDLE)


def exponential_levels(num_steps: int, config: EdmConfig) -> Levels:
    """Noise levels even in log(sigma), from sigma_max to sigma_min, then 0.

    Returns:
      (num_steps + 1,) float64.
    """
    levels = np.geomspace(config.sigma_max, config.sigma_min, num_steps)
    return np.append(levels, 0.0)


def student_levels(num_steps: int, config: EdmConfig) -> Levels:
    """Noise levels of few-step students: sigma_max, then the inner ends of equal parts, then 0.

    The parts are those of STUDENT_SPAN in ln sigma, where images take shape: more levels above it
    change nothing, and below it there is nothing left to change.

    Returns:
      (num_steps + 1,) float64.
    """
    inner = np.geomspace(*STUDENT_SPAN, num_steps + 1)[1:-1]
    return np.concatenate([[config.sigma_max], inner, [0.0]])


SCHEDULES: dict[str, Callable[[int, EdmConfig], Levels]] = {
    "edm": edm_levels,
    "log": log_levels,
    "dense": dense_levels,
    "exponential": exponential_levels,
    "student": student_levels,
}
