"""Timing on machines that others use too: pieces of work take turns, and their ratios are kept."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GEMM_SIDES = {"cpu": (2048, 512, 2048)}  # rows, inner and columns; others take GEMM_SIDE of each
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
        """This work's time over another's of the same turns: median, lowest, highest."""
        ratios = self.seconds / other.seconds
        return {
            "median": float(np.median(ratios)),
            "lowest": float(ratios.min()),
            "highest": float(ratios.max()),
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
    side = (GEMM_SIDE,) * 3
    m, k, n = GEMM_SIDES.get(jax.default_backend(), side)
    x, w = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(x, w)), 2 * m * k * n
