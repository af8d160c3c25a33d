"""A table of what each device holds of a training state."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from microdit_jax.sharding import EXPERT_WEIGHTS, REPLICATE_BELOW, names, param_spec


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
    columns = ("params", "opt_state", "ema", *["averages"] * (size["total", "averages"] > 0))
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
    mesh_text = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in mesh.axis_names)
    return "\n".join([f"mesh: {mesh_text}; MiB on each device", *lines])
