"""Weights gathered and gradients summed block by block, beside the blocks' own computation.

Left alone, XLA's scheduler gathers what crosses slices before the first kernel, and sums it after
the last. Here the order is part of the data flow: a block's weights are gathered once an earlier
block begins, and backward a block waits until the gradients of a later one are summed. Optimization
barriers are gone when XLA schedules, so what must wait for an array adds zero times a number of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from microdit_jax import sharding
from microdit_jax.models.derivatives import with_backward

AHEAD = 4  # blocks between a collective's start and where its result is awaited


class Stream:
    """Gathers the weights of one forward pass, and sums the gradients of its backward pass.

    Args:
      specs: of all weights, by block.
      cast: applied to a block's shards before they travel.
      dtype: type that gradients travel in (`sharding.scatter_sum`).
    """

    def __init__(self, specs: Any, cast: Callable[[Any], Any], dtype: str):
        self._specs, self._cast, self._dtype = specs, cast, dtype
        nothing = jnp.zeros(())
        self._inputs, self._gathered = [nothing] * AHEAD, nothing
        # Their gradients stand for the sums of the last blocks' gradients.
        self._sums = (nothing,) * AHEAD

    def enter(
        self, name: str, shards: Any, x: Float[Array, "n t d"]
    ) -> tuple[Any, Float[Array, "n t d"]]:
        """Returns a block's weights, gathered, and its input as it is.

        Args:
          name: of the block; blocks come in the order in which they run.
        """
        how = _Block(self._specs[name], self._cast, self._dtype)
        # After the gathers of the block before: XLA would join both, and await them at once.
        after = self._inputs[-AHEAD] + self._gathered
        self._inputs.append(_zero_of(x))
        weights, x, self._gathered, self._sums = _enter(shards, x, after, self._sums, how)
        return weights, x


class _Block(NamedTuple):
    specs: Any
    cast: Callable[[Any], Any]
    dtype: str

    def __hash__(self) -> int:
        return id(self.specs)


def _zero_of(tree: Any) -> Float32[Array, ""]:
    """Returns a zero that is known once all arrays are; NaN if a number of theirs is not finite."""
    numbers = [jax.lax.stop_gradient(leaf).reshape(-1)[0] for leaf in jax.tree.leaves(tree)]
    return 0.0 * jnp.stack([number.astype(jnp.float32) for number in numbers]).sum()


def _add(tree: Any, zero: Float32[Array, ""]) -> Any:
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)


def _forward(shards: Any, x: Array, after: Array, sums: tuple[Array, ...], how: _Block) -> Any:
    across = sharding.gather(how.cast(_add(shards, after)), how.specs, axes=("slices",))
    weights = sharding.gather(across, how.specs, axes=("fsdp",))
    return (weights, x, _zero_of(across), sums), None


def _backward(how: _Block, _: None, gradients: Any) -> Any:
    weights, x, _, (*newer, oldest) = gradients
    shards = sharding.scatter_sum(weights, how.specs, axes=sharding.SPLIT_AXES, dtype=how.dtype)
    return shards, _add(x, oldest), jnp.zeros(()), (_zero_of(shards), *newer)


@with_backward(_forward, _backward, static=(4,))
def _enter(shards: Any, x: Array, after: Array, sums: tuple[Array, ...], how: _Block) -> Any:
    return _forward(shards, x, after, sums, how)[0]
