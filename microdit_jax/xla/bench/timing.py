"""Times functions on machines that others use too: they take turns, and ratios are compared."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Side of the square matrices of the matmul that others are compared with.
MATMUL_SIDE = {"cpu": 2048}
OTHER_MATMUL_SIDE = 8192


class Timed(NamedTuple):
    """Seconds of each repeat of one function."""

    seconds: np.ndarray

    def summary(self) -> dict[str, float]:
        """Returns median, lowest, and "spread", the interquartile range over the median."""
        low, median, high = np.percentile(self.seconds, [25, 50, 75])
        return {
            "median": float(median),
            "lowest": float(self.seconds.min()),
            "spread": float((high - low) / median),
        }

    def over(self, other: "Timed") -> dict[str, float]:
        """Compares with another function in the same turns: median, lowest and highest ratio.

        "of_lowest" is the lowest time over the other's lowest: where the machine was busy in some
        turns, it compares the quiet ones.
        """
        ratios = self.seconds / other.seconds
        return {
            "median": float(np.median(ratios)),
            "lowest": float(ratios.min()),
            "highest": float(ratios.max()),
            "of_lowest": float(self.seconds.min() / other.seconds.min()),
        }


def take_turns(
    works: Sequence[Callable[[], Any]], *, repeats: int, warm_up: int = 1
) -> list[Timed]:
    """Calls functions in turn, each `repeats` times.

    Args:
      works: functions that return when their work is done.
      warm_up: rounds before the timed ones.
    """
    seconds = np.zeros((len(works), warm_up + repeats))
    for turn in range(warm_up + repeats):
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            seconds[i, turn] = time.perf_counter() - start
    return [Timed(row) for row in seconds[:, warm_up:]]


def matmul(dtype: str) -> tuple[Callable[[], Any], int]:
    """Returns a large matmul on the first device, which others are compared with, and its FLOPs."""
    side = MATMUL_SIDE.get(jax.default_backend(), OTHER_MATMUL_SIDE)
    x = jnp.ones((side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(multiply(x, x)), 2 * side**3
