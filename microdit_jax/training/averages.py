"""Averages of the weights by a power function, tracked while a run trains (EDM2).

`checkpoints.profiles` has their definition, `checkpoints.snapshots` keeps and combines them.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from microdit_jax.checkpoints import profiles


class PowerAverages(flax.struct.PyTreeNode):
    """Two averages of the weights since a step.

    Attributes:
      start: the step after which they began, int32 (): the stage's first, whatever came before.
      trees: trees like the weights, by their length sigma_rel.
    """

    start: Any
    trees: dict[str, Any]


def begin(params: Any, step: Int[Array, ""]) -> PowerAverages:
    """Returns the averages before the first step; the values do not matter, the sizes do."""
    # Copies, so that donating the state never donates one buffer twice.
    trees = {f"{length:g}": jax.tree.map(jnp.copy, params) for length in profiles.LENGTHS}
    return PowerAverages(jnp.copy(step), trees)


def begun(state: Any) -> Any:
    """Returns a TrainState that tracks averages from its step on, each sharded as the weights."""
    tracked = abstract(state).averages
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tracked)
    return state.replace(averages=jax.jit(begin, out_shardings=shardings)(state.params, state.step))


def abstract(state: Any) -> Any:
    """Returns a state of shapes, types and shardings as one that tracks averages."""
    trees = {f"{length:g}": state.params for length in profiles.LENGTHS}
    return state.replace(averages=PowerAverages(state.step, trees))


def advance(
    averages: PowerAverages | None, params: Any, step: Int[Array, ""]
) -> PowerAverages | None:
    """Returns the averages after a step, None where none are tracked.

    A skipped update counts as a step, whose weights are those of the step before.

    Args:
      params: the weights after the step.
      step: steps done, this one included.
    """
    if averages is None:
        return None
    t = (step - averages.start).astype(jnp.float32)
    trees = {
        length: _moved(tree, params, share(t, profiles.exponent(float(length))))
        for length, tree in averages.trees.items()
    }
    return averages.replace(trees=trees)


def share(t: Float[Array, ""], exponent: float) -> Float[Array, ""]:
    """Returns the weight of the newest step in an average, 1 - beta (section 3.1, equation 2).

    beta = (1 - 1/t)^(exponent + 1); written so that it stays exact in float32 where t is large.
    """
    return -jnp.expm1((exponent + 1) * jnp.log1p(-1 / t))


def _moved(average: Any, params: Any, rate: Float[Array, ""]) -> Any:
    return jax.tree.map(lambda a, p: a + rate.astype(a.dtype) * (p - a), average, params)
