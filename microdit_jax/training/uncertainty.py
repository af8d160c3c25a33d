"""Learned uncertainty of the loss at each noise level, which decides how much a level counts.

EDM2 (Karras et al., arXiv 2312.02696, section 2.3 and equation 21): beside the network's weights a
small u(sigma) learns the logarithm of the loss to be expected. What is minimised is
loss / exp(u) + u, so that all levels weigh alike whatever their loss is. u has an optimiser of its
own, is a part of the training state alone, and neither sampling nor conversion know of it.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from microdit_jax.models.layers import timestep_embedding
from microdit_jax.training.optim import lenient_promotion

FEATURES = 32  # of a noise level
PER_NOISE = 8.0  # their argument over c_noise = ln(sigma) / 4
ADAM = optax.scale_by_adam()


class Uncertainty(flax.struct.PyTreeNode):
    """u(sigma) = features . kernel + bias, and what its optimiser keeps.

    Attributes:
      weights: "kernel" (features,) and "bias" (), float32; at 0 the loss is the plain one.
      adam: Adam's moments and count.
    """

    weights: dict[str, Any]
    adam: Any


def begin() -> Uncertainty:
    """Returns u = 0."""
    weights = {"kernel": jnp.zeros(FEATURES, jnp.float32), "bias": jnp.zeros((), jnp.float32)}
    return Uncertainty(weights, ADAM.init(weights))


def begun(state: Any) -> Any:
    """Returns a TrainState that learns the uncertainty from its step on; all devices have it."""
    place = state.step.sharding
    return state.replace(uncertainty=jax.jit(begin, out_shardings=place)())


def abstract(state: Any) -> Any:
    """Returns a state of shapes, types and shardings as one that learns the uncertainty."""
    place = state.step.sharding
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(begin),
    )
    return state.replace(uncertainty=shapes)


def log_loss(weights: dict[str, Any], sigma: Float[Array, " n"]) -> Float[Array, " n"]:
    """Returns u, the logarithm of the loss to be expected at each noise level, float32."""
    features = timestep_embedding(PER_NOISE * jnp.log(sigma) / 4, FEATURES)  # (n, features)
    return features @ weights["kernel"] + weights["bias"]


def advance(
    uncertainty: Uncertainty,
    loss: Float[Array, " n"],
    sigma: Float[Array, " n"],
    *,
    rate: Any,
    finite: Any,
) -> Uncertainty:
    """Returns the uncertainty after a step of Adam.

    Args:
      loss, sigma: EDM loss and noise level of each image of the whole batch.
      rate: the network's learning rate, float32 ().
      finite: bool (); False leaves it as it was.
    """

    def objective(weights):
        u = log_loss(weights, sigma)
        return jnp.mean(loss * jnp.exp(-u) + u)

    grads = jax.grad(objective)(uncertainty.weights)
    with lenient_promotion():
        updates, adam = ADAM.update(grads, uncertainty.adam)
    weights = jax.tree.map(lambda w, step: w - rate * step, uncertainty.weights, updates)
    moved = Uncertainty(weights, adam)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, uncertainty)
