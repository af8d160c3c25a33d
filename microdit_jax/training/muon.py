"""Muon: momentum whose matrices are orthogonalised, AdamW for all that is no hidden matrix.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; its scale beside
AdamW is that of Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982), section 2.2.

The orthogonalisation needs whole matrices. On a mesh equal shapes are stacked, and shards of the
stack's matrices travel to the device that computes the matrix, and back: two all-to-alls for each
shape. No device computes what another one does.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from microdit_jax import sharding

MOMENTUM = 0.95
# Largest slope at zero of a p(x) = a x + b x^3 + c x^5 whose iterates stay near 1 (Jordan et al.)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# Root mean square of an orthogonalised update: AdamW's, so that both take one learning rate.
RMS = 0.2
# Matrices that read or write images, which the authors leave to AdamW
OUTER_MODULES = ("x_embedder", "final_layer")


def is_hidden_matrix(path: Sequence[str], shape: Sequence[int]) -> bool:
    """True for a hidden layer's matrix, and for the stacked matrices of experts.

    Args:
      path: names from the network's root to the weight.
    """
    experts = len(shape) == 3 and path[-1] in sharding.EXPERT_WEIGHTS
    return (len(shape) == 2 or experts) and path[0] not in OUTER_MODULES


def labels(params: Any) -> Any:
    """Returns the tree of "muon" and "adamw", by what updates each weight."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            "muon" if is_hidden_matrix(sharding.names(path), leaf.shape) else "adamw"
        ),
        params,
    )


def muon(
    scaling: optax.GradientTransformation,
    adamw: optax.GradientTransformation,
    *,
    weight_decay: float,
    compute_dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """Muon for hidden matrices, `adamw` for the rest.

    Its update takes the arguments `mesh`, the devices of the weights (None for one device), and
    `replicate_below`, as `sharding.param_spec` does.

    Args:
      scaling: by the learning rate, as `adamw` too ends with.
      compute_dtype: of the orthogonalisation's matmuls.
    """
    matrices = optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        orthogonalized(compute_dtype),
        optax.add_decayed_weights(weight_decay),
        scaling,
    )
    return optax.partition({"muon": matrices, "adamw": adamw}, labels)


def orthogonalized(compute_dtype: Any = jnp.float32) -> optax.GradientTransformationExtraArgs:
    """Replaces each update (..., m, n) by the nearest orthogonal matrix, scaled to AdamW's size."""

    def update_fn(
        updates, state, params=None, *, mesh=None, replicate_below=sharding.REPLICATE_BELOW, **_
    ):
        del params
        leaves, tree = jax.tree.flatten(updates)
        if mesh is None:
            specs = [P()] * len(leaves)
        else:
            specs = tree.flatten_up_to(
                sharding.specs(updates, mesh, replicate_below=replicate_below)
            )

        def on_a_device(shards):
            return _orthogonalize_all(shards, specs, compute_dtype, alone=mesh is None)

        if mesh is not None:
            on_a_device = jax.shard_map(
                on_a_device, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False
            )
        sizes = [RMS * max(leaf.shape[-2:]) ** 0.5 for leaf in leaves]
        leaves = [size * leaf for size, leaf in zip(sizes, on_a_device(leaves), strict=True)]
        return tree.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def _orthogonalize_all(
    shards: list[Array], specs: list[P], compute_dtype: Any, *, alone: bool
) -> list[Array]:
    """Orthogonalises matrices from their shards on this device; returns the same shards of them."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, (shard, spec) in enumerate(zip(shards, specs, strict=True)):
        groups[shard.shape, spec].append(i)
    found = list(shards)
    for (shape, spec), members in groups.items():
        # (k, m, n); of experts also (e, d, f), each by itself
        stack = jnp.stack([shards[i].astype(compute_dtype) for i in members])
        stack = stack.reshape(-1, *shape[-2:])
        stack = _each(stack) if alone else _each_once(stack, spec, axes_before=len(shape) - 2)
        for i, matrix in zip(members, stack.reshape(-1, *shape), strict=True):
            found[i] = matrix.astype(shards[i].dtype)
    return found


def _each(stack: Float[Array, "k m n"]) -> Float[Array, "k m n"]:
    # One matrix after another: a batch of matmuls takes twice the time on a CPU.
    return jax.lax.map(newton_schulz, stack)


def _each_once(stack: Float[Array, "k m n"], spec: P, *, axes_before: int) -> Array:
    """Orthogonalises the matrices of shards, each on one device of those that have parts of it.

    Args:
      stack: this device's shards; m or n is split over `sharding.SPLIT_AXES` as the spec says.
      axes_before: axes of a weight before its matrices'.
    """
    copies = sharding.copied_axes(spec, jax.sharding.get_abstract_mesh())
    shares = math.prod(jax.lax.axis_size(axis) for axis in copies)
    position, axes = sharding.split_axes(spec)
    split = position - axes_before + 1 if axes else None
    parts = math.prod(jax.lax.axis_size(axis) for axis in axes)
    count = len(stack)
    stack = jnp.pad(stack, ((0, -count % (shares * parts)), (0, 0), (0, 0)))
    if split:  # (k, m, n / parts) -> (k / parts, m, n)
        stack = jax.lax.all_to_all(stack, axes, 0, split, tiled=True)
    if copies:  # -> (k / parts / shares, m, n)
        size = len(stack) // shares
        stack = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(copies) * size, size)
    stack = _each(stack)
    if copies:
        stack = jax.lax.all_gather(stack, copies, tiled=True)
    if split:
        stack = jax.lax.all_to_all(stack, axes, split, 0, tiled=True)
    return stack[:count]


def newton_schulz(matrix: Float[Array, "m n"], eps: float = 1e-7) -> Float[Array, "m n"]:
    """Returns U V^T of the matrix U S V^T, its singular values within 0.7 to 1.2 of 1.

    Those below a hundredth of the matrix's Frobenius norm stay smaller.
    """
    m, n = matrix.shape
    x = matrix.T if m > n else matrix
    norm = jnp.linalg.norm(x.astype(jnp.float32))
    x = x / (norm + eps).astype(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if m > n else x


def update_flops(params: Any) -> int:
    """Operations of the orthogonalisation in one update, whatever the batch.

    Args:
      params: arrays or their shapes.
    """
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if is_hidden_matrix(sharding.names(path), leaf.shape):
            m, n = sorted(leaf.shape[-2:])
            count = int(np.prod(leaf.shape[:-2], dtype=np.int64))
            total += count * STEPS * (4 * m * m * n + 2 * m**3)
    return total
