"""Shardings of every array: the mesh, path rules for weights, collectives between devices.

The mesh has three axes. `data` copies the weights, `fsdp` splits them, `expert` splits the experts;
the batch is split over all three. One rule, `param_spec`, shards weights, optimiser moments and
moving average alike, since the path of each ends with the weight's own.

Training, evaluation and sampling run the network through `on_each_device`, inside `jax.shard_map`:
each device sees its own images and its own shards, and the collectives are written out. These are
`gather` before the network, `scatter_sum` after it, and two all-to-alls in each expert layer
(models/moe.py). Left to the partitioner, weights split over their columns pull activations along,
and each `split` of a fused projection costs an all-to-all that no sharding rule asked for (19 in a
step of six small blocks on a 2x4x1 mesh); it cannot partition Pallas kernels at all.
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
from jaxtyping import Float, Int

from microdit_jax.errors import UserError
from microdit_jax.machine import slices

AXES = ("data", "fsdp", "expert")
EXPERT_WEIGHTS = ("w1", "w2")  # (e, d, f) and (e, f, d); dense layers call theirs "kernel"

# Weights of fewer elements, and vectors, are copied to every device: 0.04 % of XL/2, and each would
# cost an all-gather of its own.
REPLICATE_BELOW = 2**14


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh (data, fsdp, expert) over `devices`, by default all of every process.

    `data` goes across slices, which on GPUs are nodes, fsdp and expert inside one (`slices`).

    Args:
      data, fsdp, expert: sizes of the axes; one of them may be -1, the devices left over.
      devices: real ones, or those of a topology to compile for.
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
    # Auto: sharding stays out of the arrays' types, and Flax and Optax need not know of it.
    arranged = slices.arrange(devices, tuple(sizes.values()))
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def param_spec(
    path: Sequence[str],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    *,
    replicate_below: int = REPLICATE_BELOW,
) -> P:
    """Returns the sharding of one weight, or of an optimiser's copy of it.

    Expert weights are split over `expert` by expert. Each weight is also split over `fsdp`, along
    its largest axis that divides (the last of equal ones), except for vectors and weights of fewer
    than `replicate_below` elements.

    Args:
      path: names from the tree's root to the weight; only the last one counts.
    Raises:
      UserError: the expert axis does not divide the experts.
    """
    spec: list[str | None] = [None] * len(shape)
    is_expert = len(shape) == 3 and path[-1] in EXPERT_WEIGHTS
    if is_expert and mesh.shape["expert"] > 1:
        if shape[0] % mesh.shape["expert"]:
            raise UserError(
                f"the expert axis must divide the {shape[0]} experts of {'/'.join(path)}, found "
                f"expert={mesh.shape['expert']}; choose another, or 1"
            )
        spec[0] = "expert"
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and len(shape) > 1 and math.prod(shape) >= replicate_below:
        divisible = [i for i in range(is_expert, len(shape)) if shape[i] % fsdp == 0]
        if divisible:
            spec[max(divisible, key=lambda i: (shape[i], i))] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


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
    """Returns a tree of `jax.ShapeDtypeStruct`, sharded by `param_spec`, to restore or lower with.

    Args:
      shapes: arrays or their shapes: parameters, or a whole TrainState.
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh, replicate_below=replicate_below),
    )


# ------------------------------------------------------------------------------ batches
BATCH = P(AXES)  # the batch axis over all three


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
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
def _positions(local: int, mesh: Mesh) -> Int[jax.Array, " n"]:
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
    out_specs: Any = None,
    replicate_below: int = REPLICATE_BELOW,
) -> Any:
    """Calls function(params, *rows, *whole) on each device, with its own rows and all weights.

    Weights split over `fsdp` are all-gathered; experts split over `expert` stay where they are, and
    tokens travel. Each device computes as if it were alone, so Pallas and cuDNN kernels work.

    Args:
      mesh: None to call the function on one device, with the parameters as they are.
      rows: trees of arrays whose first axis is the batch.
      whole: trees of arrays that every device needs.
      cast: applied to the shards before they travel, to send fewer bytes.
      out_specs: shardings of the function's results; None if their first axis is the batch.
    """
    if mesh is None:
        return function(params, *rows, *whole)
    param_specs = specs(params, mesh, replicate_below=replicate_below)

    def on_this_device(shards, rows, whole):
        shards = shards if cast is None else cast(shards)
        return function(gather(shards, param_specs), *rows, *whole)

    return jax.shard_map(
        on_this_device,
        mesh=mesh,
        in_specs=(param_specs, BATCH, P()),
        out_specs=BATCH if out_specs is None else out_specs,
        # Sums over mesh axes are written out; checking them would refuse Pallas kernels.
        check_vma=False,
    )(params, rows, whole)


def gather(shards: Any, specs: Any) -> Any:
    """All-gathers weights over `fsdp`; their expert axis stays split."""

    def whole(shard, spec):
        if "fsdp" not in spec:
            return shard
        return jax.lax.all_gather(shard, "fsdp", axis=spec.index("fsdp"), tiled=True)

    return jax.tree.map(whole, shards, specs)


def scatter_sum(grads: Any, specs: Any) -> Any:
    """Reduce-scatters the gathered weights' gradients over `fsdp`, in float32, into shards."""

    def shard(grad, spec):
        grad = grad.astype(jnp.float32)
        if "fsdp" not in spec:
            return grad
        axis = spec.index("fsdp")
        return jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True)

    return jax.tree.map(shard, grads, specs)


def sum_rest(grads: Any, specs: Any) -> Any:
    """All-reduces shards over the axes that their weights are not split over, once each step.

    Each large shard has an all-reduce of its own, which can start while the backward pass still
    runs; the small ones share one for each set of axes.
    """
    leaves, tree = jax.tree.flatten(grads)
    groups = defaultdict(list)
    for i, spec in enumerate(tree.flatten_up_to(specs)):
        axes = tuple(a for a in AXES if a not in spec and jax.lax.axis_size(a) > 1)
        if axes:
            groups[axes, i if leaves[i].size >= REPLICATE_BELOW else "small"].append(i)
    for (axes, _), members in groups.items():
        summed = jax.lax.psum([leaves[i] for i in members], axes)
        for i, leaf in zip(members, summed, strict=True):
            leaves[i] = leaf
    return tree.unflatten(leaves)


def norm(shards: Any, specs: Any) -> Float[jax.Array, ""]:
    """L2 norm of all weights together, float32 (), with one all-reduce of one number.

    Left to the partitioner, each weight's share would be an all-reduce of its own.
    """

    def square(shard, spec):
        copies = math.prod(jax.lax.axis_size(axis) for axis in AXES if axis not in spec)
        return jnp.square(shard.astype(jnp.float32)).sum() / copies

    return jnp.sqrt(jax.lax.psum(sum(jax.tree.leaves(jax.tree.map(square, shards, specs))), AXES))


# ------------------------------------------------------------------------------ table
def _group(path: Sequence[str]) -> str:
    experts = ", experts" if path[-1] in EXPERT_WEIGHTS else ""
    for part, prefixes in (
        ("patch mixer", ("patch_mixer",)),
        ("backbone", ("blocks_",)),
        ("text path", ("y_emb", "pooled_y_emb")),
        ("patches and noise level in, patches out", ("x_embedder", "t_embedder", "final_layer")),
    ):
        if any(name.startswith(prefixes) for name in path):
            return part + experts
    return "counters"


def table(
    state_shapes: Any, mesh: Mesh | AbstractMesh, *, replicate_below: int = REPLICATE_BELOW
) -> str:
    """Text table of a TrainState's parameters and MiB on each device, by part of the network.

    Args:
      state_shapes: a TrainState of arrays or their shapes, with "params", "opt_state" and "ema".
    """
    columns = ("params", "opt_state", "ema")
    count, tensors, size, split = (defaultdict(int) for _ in range(4))
    for path, leaf in jax.tree_util.tree_flatten_with_path(state_shapes)[0]:
        path = names(path)
        spec = param_spec(path, leaf.shape, mesh, replicate_below=replicate_below)
        held = math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape))
        for group in (_group(path), "total"):
            size[group, path[0]] += held * leaf.dtype.itemsize
            if path[0] == "params":
                tensors[group] += 1
                count[group] += math.prod(leaf.shape)
                split[group] += held
    header = ("group", "tensors", "parameters", "per device", *(f"{c}, MiB" for c in columns))
    rows = [
        (
            group,
            f"{tensors[group]:,}",
            f"{count[group]:,}",
            f"{split[group]:,}",
            *(f"{size[group, column] / 2**20:,.1f}" for column in columns),
        )
        for group in sorted(tensors, key=lambda g: (g == "total", -count[g]))
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in (header, *rows)
    ]
    mesh_text = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES)
    return "\n".join([f"mesh: {mesh_text}; MiB on each device", *lines])
