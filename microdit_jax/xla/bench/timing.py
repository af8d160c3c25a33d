"""Timing on machines that others use too: pieces of work take turns, and their ratios are kept."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GEMM_SIDES = {"cpu": 2048}  # of the square matrices; other platforms take GEMM_SIDE
GEMM_SIDE = 8192


class Timed(NamedTuple):
    """Seconds of each repeat of one piece of work."""

    seconds: np.ndarray

    def summary(self) -> dict[str, float]:
        """Median, lowest, and the distance between the quartiles over the median."""
        low, median, high = np.percentile(self.seconds, [25, 50, 75])
        return {
            "median": float(median),
            "lowest": float(self.seconds.min()),
            "spread": float((high - low) / median),
        }

    def over(self, other: "Timed") -> dict[str, float]:
        """This work's time over another's of the same turns: median, lowest, highest.

        "of_lowest" is the lowest time of all over the other's: where the machine was busy in some
        turns, that compares the quiet ones.
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
    """Times pieces of work in turn, each `repeats` times.

    Args:
      works: each returns when it is done.
      warm_up: rounds that do not count.
    """
    seconds = np.zeros((len(works), warm_up + repeats))
    for turn in range(warm_up + repeats):
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            seconds[i, turn] = time.perf_counter() - start
    return [Timed(row) for row in seconds[:, warm_up:]]


def gemm(dtype: str) -> tuple[Callable[[], Any], int]:
    """A large matrix product on the first device, and its operations: the machine's own measure."""
    side = GEMM_SIDES.get(jax.default_backend(), GEMM_SIDE)
    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(x, x)), 2 * side**3
