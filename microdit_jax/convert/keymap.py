"""The rename table between PyTorch's state dicts and Flax parameter trees, and its accounting.

A model's converter is a list of rules from Flax paths ("blocks_3/attn/qkv/kernel") to torch names
("blocks.3.attn.qkv.weight"), each with a transform that knows both layouts. `build_table` applies
them to the shapes the Flax model expects; the table then converts both ways and accounts for every
tensor: missing, unexpected, doubly mapped and misshapen ones are listed all at once.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Shaped

from microdit_jax.convert.formats.file_bytes import CHUNK
from microdit_jax.errors import UserError, visible
from microdit_jax.trees import flatten, unflatten

Shape = tuple[int, ...]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Transform:
    """The layout of one array on either side; both directions return views where they can.

    Attributes:
      torch_shape: the torch tensor's shape, from the Flax parameter's.
      to_flax: torch tensor, Flax shape -> Flax parameter.
      to_torch: Flax parameter, torch shape -> torch tensor.
    """

    torch_shape: Callable[[Shape], Shape]
    to_flax: Callable[[np.ndarray, Shape], np.ndarray]
    to_torch: Callable[[np.ndarray, Shape], np.ndarray]


SAME = Transform(lambda shape: shape, lambda a, _: a, lambda a, _: a)
# Linear layers: weight (out, in) <-> kernel (in, out).
LINEAR = Transform(lambda shape: shape[::-1], lambda a, _: a.T, lambda a, _: a.T)
# Convolutions: weight (out, in, height, width) <-> kernel (height, width, in, out).
CONV = Transform(
    lambda shape: (shape[3], shape[2], shape[0], shape[1]),
    lambda a, _: a.transpose(2, 3, 1, 0),
    lambda a, _: a.transpose(3, 2, 0, 1),
)


def patch_conv(channels: int, patch: int) -> Transform:
    """Layout of a convolution with stride = size: weight (d, C, p, p) <-> kernel (C p p, d)."""
    return Transform(
        lambda shape: (shape[1], channels, patch, patch),
        lambda a, shape: a.reshape(shape[1], shape[0]).T,
        lambda a, shape: a.T.reshape(shape),
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """Flax paths that fully match `pattern` belong to the torch tensor `name`.

    `name` may refer to the pattern's groups as re.sub does (r"\\1.weight"), or be a function of the
    match; '/' becomes '.' and a list's glued index ("blocks_3") its own part ("blocks.3") after,
    unless `exact`. Several names: the parameter is fused of these tensors, equal in shape, stacked
    along their first axis before the transform (q, k and v of one projection).
    """

    pattern: str
    name: str | Callable[[re.Match], str] | Sequence[str]
    transform: Transform = SAME
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the rename table: a torch tensor, and the parameter it is, or is a part of.

    Attributes:
      part: (i, count): the tensor is the i-th of `count` that are fused into the parameter.
    """

    path: str
    flax_shape: Shape
    torch_name: str
    torch_shape: Shape
    transform: Transform
    part: tuple[int, int] = (0, 1)


def abstract_params(network: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Params:
    """Returns the shapes and dtypes of a network's parameters, computing none.

    Args:
      inputs: shapes and dtypes of the arguments of its call.
    """
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]


def torch_name(path: str) -> str:
    """Translates a Flax path to a torch name: blocks_3/attn/qkv -> blocks.3.attn.qkv."""
    return re.sub(r"_(\d+)(?=[/.]|$)", r".\1", path).replace("/", ".")


def build_table(rules: Sequence[Rule], expected: Mapping[str, Any]) -> list[Entry]:
    """Returns the rename table for the parameters that a Flax model expects.

    Args:
      rules: the first whose pattern matches a path applies.
      expected: nested dict whose leaves have a shape, such as jax.eval_shape of the model's init.
    Raises:
      ValueError: a path that no rule matches, or two that come to the same tensor: a fault of the
        rules, not of a file.
    """
    table = []
    for path, leaf in flatten(expected).items():
        for rule in rules:
            if match := re.fullmatch(rule.pattern, path):
                table += _entries(rule, match, tuple(leaf.shape))
                break
        else:
            raise ValueError(f"no rule matches the parameter {path}")
    doubled = [n for n, count in Counter(e.torch_name for e in table).items() if count > 1]
    if doubled:
        raise ValueError(f"several parameters come from one tensor: {', '.join(doubled)}")
    return table


def _entries(rule: Rule, match: re.Match, shape: Shape) -> list[Entry]:
    """Returns the table's lines for the parameter whose path is `match`."""
    templates = [rule.name] if callable(rule.name) or isinstance(rule.name, str) else rule.name
    names = [name(match) if callable(name) else match.expand(name) for name in templates]
    if not rule.exact:
        names = [torch_name(name) for name in names]
    whole, count = tuple(rule.transform.torch_shape(shape)), len(names)
    if count > 1 and whole[0] % count:
        raise ValueError(f"{match[0]} {shape} does not fall into {count} equal tensors")
    part_shape = (whole[0] // count, *whole[1:]) if count > 1 else whole
    return [
        Entry(match[0], shape, name, part_shape, rule.transform, (i, count))
        for i, name in enumerate(names)
    ]


def is_finite(tensor: Shaped[np.ndarray, "..."]) -> bool:
    """Returns True if no value is NaN or infinite as float32; reads a few MB at a time."""
    if tensor.dtype.kind not in "fV" or not tensor.size:
        return True
    # Axes sorted by stride, so that memory is read in order however the axes are transposed.
    by_stride = tensor.transpose(np.argsort([-s for s in tensor.strides], kind="stable"))
    rows = by_stride.reshape(-1) if by_stride.flags.c_contiguous else by_stride
    rows = np.atleast_1d(rows)
    step = max(1, CHUNK * len(rows) // (rows.size * rows.itemsize))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if part.itemsize < 4:
            part = part.astype(np.float32)
        # min and max propagate NaN, so that they test all values without a temporary array.
        with np.errstate(over="ignore"):  # 1e300 in float64 is finite until it is cast
            ends = np.array([part.min(), part.max()]).astype(np.float32)
        if not np.isfinite(ends).all():
            return False
    return True


def check_values(
    tensors: Mapping[str, np.ndarray], progress: Callable[[int], Any] | None = None
) -> None:
    """Raises UserError naming every tensor with a NaN or infinite value."""
    bad = []
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            bad.append(name)
        if progress:
            progress(tensor.nbytes)
    if bad:
        raise UserError(
            "expected weights that are finite as float32, found NaN, infinite or larger values in "
            f"{len(bad)} tensors: {_listed(bad)}; take a checkpoint from before training diverged"
        )


def constant_weights(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Names the matrices and kernels whose values are all the same, which no training leaves.

    Biases and norms may be. A few values of each tensor are compared first, so that this is quick.
    """
    found = []
    for name, tensor in tensors.items():
        if min(tensor.shape[:2], default=0) < 2 or tensor.ndim < 2 or tensor.dtype.kind not in "fV":
            continue
        corner = tensor[(0,) * tensor.ndim]
        few = tensor[tuple(slice(None, None, max(1, n // 4)) for n in tensor.shape)]
        if (few == corner).all() and (tensor == corner).all():
            found.append(f"{name} (all {float(corner):g})")
    return found


def _listed(names: Sequence[str]) -> str:
    """All names that a person can take in; names of a file are shown escaped."""
    return visible(", ".join(names), 20_000)


def _check_floating(tensors: Mapping[str, np.ndarray], table: Sequence[Entry]) -> None:
    """Raises UserError if weights are integers, which are codes of a quantised model."""
    found = [
        f"{e.torch_name} ({tensors[e.torch_name].dtype})"
        for e in table
        if tensors[e.torch_name].dtype.kind not in "fV"  # V: bfloat16 and float8 of ml_dtypes
    ]
    if found:
        raise UserError(
            f"expected weights of a floating type, found {len(found)} tensors of others: "
            f"{_listed(found)}; save them as float32, float16 or bfloat16"
        )


def _account(
    found: Mapping[str, Any],
    wanted: Mapping[str, Shape],
    what: str,
) -> None:
    """Raises UserError, listing all faults, unless each wanted name is there once, in its shape."""
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in found]
    unexpected = [f"{name} {tuple(found[name].shape)}" for name in found if name not in wanted]
    misshapen = [
        f"{name} (expected {shape}, found {tuple(found[name].shape)})"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    lines = [f"{kind}: {_listed(names)}" for kind, names in faults.items() if names]
    if lines:
        raise UserError(
            f"expected the {len(wanted)} {what} of this config, found {len(found)}; "
            f"{'; '.join(lines)}; give the file that fits the config, or leave the config out"
        )


def to_params(
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Entry],
    buffers: Mapping[str, Shape] | None = None,
    *,
    check_finite: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Params:
    """Converts a state dict to Flax parameters, float32; views where the tensors are float32.

    Fused parameters are copies.

    Args:
      buffers: further tensors the file must have that are not parameters.
      check_finite: read every value and name the tensors with NaN or infinite ones.
      progress: called with the number of bytes just checked.
    Raises:
      UserError: tensors are missing, unexpected, misshapen, not finite or no floating numbers; all
        are listed.
    """
    wanted = {e.torch_name: e.torch_shape for e in table} | dict(buffers or {})
    _account(tensors, wanted, "tensors")
    _check_floating(tensors, table)
    if check_finite:
        check_values(tensors, progress)
    flat = {}
    for path, entries in _by_path(table).items():
        parts = [tensors[e.torch_name].astype(np.float32, copy=False) for e in entries]
        whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
        flat[path] = entries[0].transform.to_flax(whole, entries[0].flax_shape)
    return unflatten(flat)


def to_tensors(params: Mapping[str, Any], table: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Converts Flax parameters to a state dict, in the table's order; views wherever possible.

    Raises:
      UserError: parameters are missing, unexpected or misshapen; all are listed.
    """
    flat = flatten(params)
    _account(flat, {e.path: e.flax_shape for e in table}, "parameters")
    tensors = {}
    for path, entries in _by_path(table).items():
        leaf = np.asarray(jax.device_get(flat[path]))
        for e in entries:
            i, count = e.part
            whole = (e.torch_shape[0] * count, *e.torch_shape[1:]) if count > 1 else e.torch_shape
            tensor = e.transform.to_torch(leaf, whole)
            tensors[e.torch_name] = np.split(tensor, count)[i] if count > 1 else tensor
    return tensors


def _by_path(table: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Groups the table's lines by parameter, the parts of a fused one in order."""
    groups: dict[str, list[Entry]] = {}
    for entry in table:
        groups.setdefault(entry.path, []).append(entry)
    return groups
