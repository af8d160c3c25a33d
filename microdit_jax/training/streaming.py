"""Weights gathered and gradients summed block by block, beside the blocks' own computation.

Left alone, XLA's scheduler gathers what crosses slices before the first kernel, sums it after the
last, and gathers inside a slice right where the result is awaited. Here the order is part of the
data flow: a block's weights are gathered once an earlier block begins, and backward a block waits
until the gradients of a later one are summed. Optimization barriers are gone when XLA schedules, so
what must wait for an array adds zero times a number of it.

A block's modulation is a product of one row an image and a float32 matrix, in XL/2 a quarter of all
bytes gathered. Rows travel in place of the matrix: each device multiplies all images' rows with its
own columns, and the products travel back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32

from microdit_jax import sharding
from microdit_jax.models.activations import gelu_tanh
from microdit_jax.models.derivatives import with_backward
from microdit_jax.models.matmuls import matmul

AHEAD = 6  # blocks between a collective's start and where its result is awaited
AHEAD_INSIDE = 1  # the same, of all-gathers inside a slice
MODULATION = "adaLN_modulation_1"


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
        self._inputs: list[Array] = []
        self._known = self._rows = nothing
        # Their gradients stand for the sums of the last blocks' gradients.
        self._sums = (nothing,) * AHEAD

    def enter(
        self, name: str, shards: Any, x: Float[Array, "n t d"], c: Float[Array, "n d_c"]
    ) -> tuple[Any, Float[Array, "n t d"], Float[Array, "n six_d"] | None]:
        """Returns a block's weights, gathered, its input as it is, and its modulation or None.

        Args:
          name: of the block; blocks come in the order in which they run.
          c: what the modulation is computed from.
        """
        how = _Block(self._specs[name], self._cast, self._dtype)
        number = len(self._inputs)
        self._inputs.append(_zero_of(x))
        start = inside = jnp.zeros(())
        if number == 0:  # behind the weights of all that comes before
            self._known = _zero_of((c, x))
            self._rows = _gathered_rows(gelu_tanh(c + self._known))
        else:
            early = self._inputs[0] if number == 1 else self._known
            start = self._inputs[number - AHEAD] if number >= AHEAD else early
            inside = self._known if number == 1 else self._inputs[max(1, number - AHEAD_INSIDE)]
        # The first blocks gather all: rows are not there yet.
        rows = self._rows if number >= AHEAD and how.splits_columns else None
        weights, x, modulation, self._sums = _enter(
            shards, rows, x, (start, inside), self._sums, how
        )
        return weights, x, modulation


class _Block(NamedTuple):
    specs: Any
    cast: Callable[[Any], Any]
    dtype: str

    def __hash__(self) -> int:
        return id(self.specs)

    @property
    def splits_columns(self) -> bool:
        """True if the modulation's matrix is split over all devices of a copy, by columns."""
        return sharding.split_axes(self.specs[MODULATION]["kernel"]) == (1, sharding.SPLIT_AXES)

    def without_modulation(self, tree: Any) -> Any:
        return {name: part for name, part in tree.items() if name != MODULATION}


def _zero_of(tree: Any) -> Float32[Array, ""]:
    """Returns a zero that is known once all arrays are; NaN if a number of theirs is not finite."""
    numbers = [jax.lax.stop_gradient(leaf).reshape(-1)[0] for leaf in jax.tree.leaves(tree)]
    return 0.0 * jnp.stack([number.astype(jnp.float32) for number in numbers]).sum()


def _row_by_row(x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
    """Keeps each token's numbers together in memory.

    Here XLA would lay out all tokens by columns, and transpose them in many kernels.
    """
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2)))


def _add(tree: Any, zero: Float32[Array, ""]) -> Any:
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)


# ------------------------------------------------------------------------------ modulation
def _gathered_rows(rows: Float[Array, "n d_c"]) -> Float[Array, "n_all d_c"]:
    """Gathers the rows of all devices between which weights are split."""
    for axis in reversed(sharding.SPLIT_AXES):
        rows = jax.lax.all_gather(rows, axis, axis=0, tiled=True)
    return rows


def _modulation(rows: Float[Array, "n_all d_c"], columns: Any) -> Float[Array, "n six_d"]:
    """Multiplies all images' rows with a device's columns; returns all columns of its own rows."""
    products = matmul(rows, columns["kernel"])  # (n_all, six_d / devices)
    products = jax.lax.all_to_all(products, sharding.SPLIT_AXES, 0, 1, tiled=True)  # (n, six_d)
    return products + columns["bias"][None]


# ------------------------------------------------------------------------------ one block
def _forward(
    shards: Any,
    rows: Array | None,
    x: Array,
    after: tuple[Array, Array],
    sums: tuple[Array, ...],
    how: _Block,
) -> Any:
    start, inside = after
    specs, kept, modulation = how.specs, (rows, None), None
    shards = _add(shards, start)
    if rows is not None:
        kept = (rows, shards[MODULATION])
        modulation = _modulation(rows, shards[MODULATION])
        shards, specs = how.without_modulation(shards), how.without_modulation(specs)
    across = _gathered_across(how.cast(shards), specs, inside)
    weights = sharding.gather(across, specs, axes=("fsdp",))
    return (weights, _row_by_row(x), modulation, sums), kept


def _backward(how: _Block, kept: Any, gradients: Any) -> Any:
    weights, x, modulation, (*newer, oldest) = gradients
    (rows, columns), specs, of_rows = kept, how.specs, None
    if rows is not None:
        specs = how.without_modulation(specs)
    shards = sharding.scatter_sum(weights, specs, axes=sharding.SPLIT_AXES, dtype=how.dtype)
    if rows is not None:
        of_rows, shards[MODULATION] = jax.vjp(_modulation, rows, columns)[1](modulation)
    nothing = jnp.zeros(())
    return (
        shards,
        of_rows,
        _row_by_row(_add(x, oldest)),
        (nothing, nothing),
        (_zero_of(shards), *newer),
    )


@with_backward(_forward, _backward, static=(5,))
def _enter(
    shards: Any,
    rows: Array | None,
    x: Array,
    after: tuple[Array, Array],
    sums: tuple[Array, ...],
    how: _Block,
) -> Any:
    return _forward(shards, rows, x, after, sums, how)[0]


def _gathered_across(shards: Any, specs: Any, inside: Array) -> Any:
    """Gathers a block's shards over the slices, all matrices of a type as one array.

    Args:
      inside: a zero; what is gathered is not used before it is known.
    """
    leaves, tree = jax.tree.flatten(shards)
    splits = [sharding.split_axes(spec) for spec in tree.flatten_up_to(specs)]
    groups: dict[Any, list[int]] = {}
    for i, (_, axes) in enumerate(splits):
        if "slices" in axes:
            groups.setdefault(leaves[i].dtype, []).append(i)
    for members in groups.values():
        # (..., f, ...) -> (f, ...)
        parts = [jnp.moveaxis(leaves[i], splits[i][0], 0) for i in members]
        flat = jnp.concatenate([part.reshape(-1) for part in parts])
        flat = jax.lax.all_gather(flat, "slices")  # (slices, elements)
        start = 0
        for i, part in zip(members, parts, strict=True):
            whole = flat[:, start : start + part.size] + inside.astype(flat.dtype)
            start += part.size
            # (slices, f * ...) -> (slices * f, ...) -> (..., slices * f, ...)
            whole = whole.reshape(-1, *part.shape[1:])
            leaves[i] = jnp.moveaxis(whole, 0, splits[i][0])
    return tree.unflatten(leaves)
