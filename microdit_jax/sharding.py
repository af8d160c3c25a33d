"""Shardings of every array: the mesh, path rules for weights, collectives between devices.

The mesh has three axes. `data` copies the weights, `fsdp` splits them, `expert` splits the experts;
the batch is split over all three. Where fsdp is wider than a slice, a fourth axis, `slices`, is the
part of it that goes across slices. One rule, `param_spec`, shards weights, optimiser moments and
moving average alike, since the path of each ends with the weight's own.

Training, evaluation and sampling run the network through `on_each_device`, inside `jax.shard_map`:
each device sees its own images and its own shards, and the collectives are written out. These are
`gather` before the network, `scatter_sum` after it, and two all-to-alls in each expert layer
(models/moe.py). Left to the partitioner, weights split over their columns pull activations along,
and each `split` of a fused projection costs an all-to-all that no sharding rule asked for (19 in a
step of six small blocks on a 2x4x1 mesh); nor can it partition Pallas kernels.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from microdit_jax.errors import UserError
from microdit_jax.machine import slices

AXES = ("data", "fsdp", "expert")
AXES_ACROSS = ("data", "slices", "fsdp", "expert")  # where fsdp crosses slices
SPLIT_AXES = ("fsdp", "slices")  # that weights are split over, the major one first
EXPERT_WEIGHTS = ("w1", "w2")  # (e, d, f) and (e, f, d); dense layers call theirs "kernel"

# Weights of fewer elements, and vectors, are copied to every device: 0.04 % of XL/2, and each would
# cost an all-gather of its own.
REPLICATE_BELOW = 2**14


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    across: int | None = None,
) -> Mesh:
    """The mesh (data, fsdp, expert) over `devices`, by default all of every process.

    `data` goes across slices, which on GPUs are nodes, fsdp and expert inside one (`slices`). Where
    they do not fit into one, fsdp is made of two axes, `slices` across them and `fsdp` inside.

    Args:
      data, fsdp, expert: sizes of the axes; one of them may be -1, the devices left over.
      devices: real ones, or those of a topology to compile for.
      across: size of the axis `slices`; None: by the devices' slices.
    Raises:
      UserError: sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, count = {"data": data, "fsdp": fsdp, "expert": expert}, len(devices)
    found = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"mesh sizes must be positive, at most one of them -1 (the rest), found {found}"
        )
    given = math.prod(size for size in sizes.values() if size != -1)
    if free and count % given == 0:
        sizes[free[0]] = count // given
    elif free or given != count:
        raise UserError(
            f"the mesh {found} takes {'a multiple of ' * bool(free)}{given} devices, found {count};"
            f" choose sizes whose product is {count}, such as mesh=-1x1x1 (-1: the rest)"
        )
    data, fsdp, expert = sizes.values()
    across = across or slices.crossed(devices, fsdp, expert)
    # Auto: sharding stays out of the arrays' types, and Flax and Optax need not know of it.
    arranged = slices.arrange(devices, (data * across, fsdp // across, expert))
    if across > 1:
        arranged = arranged.reshape(data, across, fsdp // across, expert)
    axes = AXES_ACROSS if across > 1 else AXES
    return Mesh(arranged, axes, axis_types=(AxisType.Auto,) * len(axes))


def param_spec(
    path: Sequence[str],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    *,
    replicate_below: int = REPLICATE_BELOW,
) -> P:
    """Returns the sharding of one weight, or of an optimiser's copy of it.

    Expert weights are split over `expert` by expert. Each weight is also split over `fsdp` (and
    `slices`, if an axis divides by both), along its largest axis that divides (the last of equal
    ones), except for vectors and weights of fewer than `replicate_below` elements.

    Args:
      path: names from the tree's root to the weight; only the last one counts.
    Raises:
      UserError: the expert axis does not divide the experts.
    """
    spec: list[str | tuple[str, ...] | None] = [None] * len(shape)
    is_expert = len(shape) == 3 and path[-1] in EXPERT_WEIGHTS
    if is_expert and mesh.shape["expert"] > 1:
        if shape[0] % mesh.shape["expert"]:
            raise UserError(
                f"the expert axis must divide the {shape[0]} experts of {'/'.join(path)}, found "
                f"expert={mesh.shape['expert']}; choose another, or 1"
            )
        spec[0] = "expert"
    axes = [axis for axis in SPLIT_AXES if mesh.shape.get(axis, 1) > 1]
    while axes and len(shape) > 1 and math.prod(shape) >= replicate_below:
        parts = math.prod(mesh.shape[axis] for axis in axes)
        divisible = [i for i in range(is_expert, len(shape)) if shape[i] % parts == 0]
        if divisible:
            longest = max(divisible, key=lambda i: (shape[i], i))
            spec[longest] = tuple(axes) if len(axes) > 1 else axes[0]
            break
        axes.pop()  # split inside each slice alone
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def split_axes(spec: P) -> tuple[int, tuple[str, ...]]:
    """Returns which axis of a weight is split over SPLIT_AXES, and over which; (0, ()) for none."""
    for position, entry in enumerate(spec):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        if axes and axes[0] in SPLIT_AXES:
            return position, tuple(axes)
    return 0, ()


def copied_axes(spec: P, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the axes of a mesh, of more than one device, over which a weight is copied."""
    used = {*split_axes(spec)[1], *(entry for entry in spec if isinstance(entry, str))}
    return tuple(a for a in mesh.axis_names if a not in used and mesh.shape[a] > 1)


def names(path: Sequence[Any]) -> tuple[str, ...]:
    """Returns the keys of a JAX tree path as strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def specs(shapes: Any, mesh: Mesh | AbstractMesh, *, replicate_below: int = REPLICATE_BELOW) -> Any:
    """Returns the tree of `param_spec`s for a tree of arrays or their shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: param_spec(
            names(path), leaf.shape, mesh, replicate_below=replicate_below
        ),
        shapes,
    )


def shardings(
    shapes: Any, mesh: Mesh | AbstractMesh, *, replicate_below: int = REPLICATE_BELOW
) -> Any:
    """Returns the tree of NamedShardings by `param_spec`, of parameters or a whole TrainState."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(shapes, mesh, replicate_below=replicate_below),
        is_leaf=lambda leaf: isinstance(leaf, P),
    )


def with_shardings(
    shapes: Any, mesh: Mesh | AbstractMesh, *, replicate_below: int = REPLICATE_BELOW
) -> Any:
    """Returns the shapes of a tree, sharded by `param_spec`, to restore or lower with."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh, replicate_below=replicate_below),
    )


# ------------------------------------------------------------------------------ batches
def batch_spec(mesh: Mesh | AbstractMesh) -> P:
    """Returns the spec of arrays whose first axis is the batch: split over all of the mesh."""
    return P(mesh.axis_names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, batch_spec(mesh))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Makes global arrays of a batch, to which each process contributes its share.

    Args:
      batch: arrays (n / processes, ...), block p of the global batch on process p; scalars, equal
        on all processes, stay whole.
    Returns:
      The batch as global arrays (n, ...), and "position" (n,) int32: each image's index in the
      batch, which decides its noise, whatever device it lands on.
    Raises:
      UserError: the global batch does not divide over the devices.
    """
    rows = {name: len(value) for name, value in batch.items() if np.ndim(value)}
    local, processes = next(iter(rows.values())), jax.process_count()
    if set(rows.values()) != {local} or local * processes % mesh.size:
        raise UserError(
            f"the batch must be a multiple of {mesh.size} devices, found {rows} on each of "
            f"{processes} processes; change train.batch_size"
        )
    scalars = {name: value for name, value in batch.items() if name not in rows}
    # All arrays of one sharding in one call: one by one, each takes a tenth of a millisecond more.
    make_global = jax.make_array_from_process_local_data
    split = make_global(batch_sharding(mesh), {name: batch[name] for name in rows})
    whole = make_global(NamedSharding(mesh, P()), scalars)
    return {"position": _positions(local, mesh), **split, **whole}


@functools.lru_cache(maxsize=8)
def _positions(local: int, mesh: Mesh) -> Int[Array, " n"]:
    """Makes the array of positions once for each size of batch."""
    here = jax.process_index() * local + np.arange(local, dtype=np.int32)
    return jax.make_array_from_process_local_data(batch_sharding(mesh), here)


# --------------------------------------------------------- collectives, inside shard_map
def on_each_device(
    function: Callable[..., Any],
    mesh: Mesh | AbstractMesh | None,
    params: Any,
    rows: tuple[Any, ...],
    whole: tuple[Any, ...] = (),
    *,
    cast: Callable[[Any], Any] | None = None,
    gathered: bool = True,
    out_specs: Any = None,
    replicate_below: int = REPLICATE_BELOW,
) -> Any:
    """Calls function(params, *rows, *whole) on each device, with its own rows and all weights.

    Weights split over SPLIT_AXES are all-gathered; experts split over `expert` stay where they are,
    and tokens travel. Each device computes as if it were alone, so Pallas and cuDNN kernels work.

    Args:
      mesh: None: one device, and the parameters as they are.
      rows: trees of arrays whose first axis is the batch.
      whole: trees of arrays that every device needs.
      cast: applied to the shards before they travel, to send fewer bytes.
      gathered: False to call the function with the shards as they are.
      out_specs: shardings of the function's results; None if their first axis is the batch.
    """
    if mesh is None:
        return function(params, *rows, *whole)
    param_specs = specs(params, mesh, replicate_below=replicate_below)

    def on_this_device(shards, rows, whole):
        if not gathered:
            return function(shards, *rows, *whole)
        shards = shards if cast is None else cast(shards)
        return function(gather(shards, param_specs), *rows, *whole)

    return jax.shard_map(
        on_this_device,
        mesh=mesh,
        in_specs=(param_specs, batch_spec(mesh), P()),
        out_specs=batch_spec(mesh) if out_specs is None else out_specs,
        # Sums over mesh axes are written out; checking them would refuse Pallas kernels.
        check_vma=False,
    )(params, rows, whole)


def gather(shards: Any, specs: Any, *, axes: Sequence[str] = SPLIT_AXES) -> Any:
    """All-gathers weights over some of SPLIT_AXES; their expert axis stays split.

    First over `slices`, where a device receives its shard of `fsdp` alone over the network.
    """

    def whole(shard, spec):
        position, split = split_axes(spec)
        for axis in (axis for axis in reversed(split) if axis in axes):
            shard = jax.lax.all_gather(shard, axis, axis=position, tiled=True)
        return shard

    return jax.tree.map(whole, shards, specs)


def scatter_sum(
    grads: Any, specs: Any, *, axes: Sequence[str] = ("fsdp",), dtype: Any = jnp.float32
) -> Any:
    """Sums the gathered weights' gradients over some of SPLIT_AXES, in float32, into shards.

    Args:
      dtype: type that they travel in. float32 is a reduce-scatter. A 16-bit type is an all-to-all
        of half of its bytes, since a reduce-scatter would also add in 16 bits.
    """

    def shard(grad, spec):
        position, split = split_axes(spec)
        for axis in (axis for axis in axes if axis in split):
            grad = _scattered(grad, axis, position, dtype)
        return grad.astype(jnp.float32)

    return jax.tree.map(shard, grads, specs)


def _scattered(grad: Array, axis: str, position: int, dtype: Any) -> Array:
    """Sums over a mesh axis; a device keeps its part of the array's axis `position`."""
    if jnp.dtype(dtype) == jnp.float32:
        return jax.lax.psum_scatter(jnp.float32(grad), axis, scatter_dimension=position, tiled=True)
    parts, shape = jax.lax.axis_size(axis), grad.shape
    # (..., f, ...) -> (..., parts, f / parts, ...), and each device's own part of all devices
    grad = grad.reshape(*shape[:position], parts, -1, *shape[position + 1 :]).astype(dtype)
    grad = jax.lax.all_to_all(grad, axis, position, position, tiled=True)
    return grad.astype(jnp.float32).sum(axis=position)


def sum_rest(grads: Any, specs: Any) -> Any:
    """All-reduces shards over the axes that their weights are copied over, once each step.

    Each large shard has an all-reduce of its own, the small ones share one for each set of axes.
    """
    leaves, tree = jax.tree.flatten(grads)
    groups = defaultdict(list)
    mesh = jax.sharding.get_abstract_mesh()
    for i, spec in enumerate(tree.flatten_up_to(specs)):
        if axes := copied_axes(spec, mesh):
            groups[axes, i if leaves[i].size >= REPLICATE_BELOW else "small"].append(i)
    for (axes, _), members in groups.items():
        summed = jax.lax.psum([leaves[i] for i in members], axes)
        for i, leaf in zip(members, summed, strict=True):
            leaves[i] = leaf
    return tree.unflatten(leaves)


def norm(shards: Any, specs: Any) -> Float[Array, ""]:
    """L2 norm of all weights together, float32 (), with one all-reduce of one number.

    Left to the partitioner, each weight's share would be an all-reduce of its own.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def square(shard, spec):
        copies = math.prod(mesh.shape[axis] for axis in copied_axes(spec, mesh))
        return jnp.square(shard.astype(jnp.float32)).sum() / copies

    squares = jax.tree.leaves(jax.tree.map(square, shards, specs))
    return jnp.sqrt(jax.lax.psum(sum(squares), mesh.axis_names))
