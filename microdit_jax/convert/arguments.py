"""Parts that the kinds of model share: configs from JSON and from shapes, model folders, names."""

import collections.abc
import dataclasses
import hashlib
import json
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from microdit_jax.checkpoints.model_folder import load_model
from microdit_jax.errors import UserError, visible

__all__ = [
    "config_from_fields",
    "count_blocks",
    "fields_by_our_names",
    "is_number",
    "matrix_shapes",
    "open_folder",
    "refuse_other_config",
    "shape_of",
    "size_faults",
]

Config = TypeVar("Config")  # a dataclass
MAX_SIZE, MAX_LAYERS = 2**24, 512  # of a network that a file describes
# Sizes that take time or memory without taking parameters, which the files would have to hold
MAX_SIZES = {
    **dict.fromkeys(("depth", "patch_mixer_depth", "layers", "layers_per_block"), MAX_LAYERS),
    **{"input_size": 1024, "max_tokens": 4096, "max_distance": 65536},
}
POSITIVE = ("norm_eps",)
# The fix where tensors are those of another kind of model.
OTHER_KIND = "give such a file, or name its kind: python -m convert --kind=..."


def fields_by_our_names(
    cls: type, given: dict[str, Any], names: Mapping[str, str],
    read: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[dict[str, Any], Mapping[str, str]]:  # fmt: skip
    """Returns the fields of `cls` in a JSON file that has them under our names or a library's.

    Args:
      names: the library's, of our fields.
      read: gives ours from the library's, and refuses what `cls` cannot be.
    Returns:
      The fields, and the names that they were read from; {} where those were ours.
    """
    if set(given) <= {field.name for field in dataclasses.fields(cls)}:
        return given, {}
    return read(given), names


def config_from_fields(
    cls: type[Config], fields: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> Config:
    """Makes the config dataclass `cls` from the fields of a JSON file.

    Args:
      names: of fields in the file that they were read from, where it has others.
    Raises:
      UserError: fields that `cls` does not have, or too few, or values that they cannot have.
    """
    fields_of = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]  # a dataclass
    known = {field.name: field for field in fields_of}
    unknown = [name for name in fields if name not in known]  # "" may be one of them
    missing = [
        name
        for name, field in known.items()
        if name not in fields and field.default is field.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        found = ", ".join(name or "a field without a name" for name in unknown)
        if missing:
            found = f"unknown {found or 'none'}, missing {', '.join(missing)}"
        raise UserError(
            f"expected fields of {cls.__name__} ({', '.join(known)}), found {visible(found)}; "
            "correct them"
        )
    for name, hint in get_type_hints(cls).items():
        most = MAX_SIZES.get(name, MAX_SIZE)
        good = name not in fields or _fits(fields[name], hint, most)
        if not good or (name in POSITIVE and not fields.get(name, 1) > 0):
            kind = "positive float" if name in POSITIVE else getattr(hint, "__name__", hint)
            raise UserError(
                f"expected {(names or {}).get(name, name)} of {cls.__name__} as {kind} of at most "
                f"{most:,}, found {visible(repr(fields[name]), 60)}; correct it"
            )
    hints = get_type_hints(cls)
    try:
        return cls(**{name: _floating(value, hints[name]) for name, value in fields.items()})
    except UserError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(
            f"expected a {cls.__name__} that can be, found {error}; correct it"
        ) from error


def _floating(value: Any, hint: Any) -> Any:
    """Makes floats of whole numbers that JSON has in their place."""
    if hint is float and isinstance(value, int):
        return float(value)
    if get_origin(hint) is collections.abc.Sequence and get_args(hint) == (float,):
        return [_floating(part, float) for part in value]
    return value


def _fits(value: Any, hint: Any, most: int) -> bool:
    """Returns True if a value of any origin is of a field's type, and no number above `most`."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, choice, most) for choice in get_args(hint))
    if get_origin(hint) in (collections.abc.Sequence, tuple, list):
        item = get_args(hint)[0]
        short = isinstance(value, list | tuple) and len(value) <= MAX_LAYERS
        return short and all(_fits(part, item, most) for part in value)
    if hint in (int, float):
        kinds = (int, np.integer) if hint is int else (int, float, np.number)
        number = isinstance(value, kinds) and not isinstance(value, bool)
        return number and bool(-most <= value <= most)
    return isinstance(value, hint)


def is_number(value: Any) -> bool:
    """Returns True for a finite number of JSON's, which true and false are not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -sys.float_info.max <= value <= sys.float_info.max


def size_faults(
    given: Mapping[str, Any], sizes: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> list[str]:
    """Lists in words the sizes that a config states otherwise than the tensors have them.

    Args:
      given: the config's fields; a missing one is no fault.
      sizes: as the tensors' shapes have them.
      names: of fields in the file that they were read from, where it has others.
    """
    return [
        f"{(names or {}).get(name, name)} {visible(given[name], 60)} (the tensors have {size})"
        for name, size in sizes.items()
        if given.get(name, size) != size
    ]


def refuse_other_config(faults: Sequence[str]) -> None:
    """Raises UserError if there are faults: the config is not that of the weights."""
    if faults:
        raise UserError(
            f"expected the config of these weights, found {'; '.join(faults)}; give the two that "
            "belong together"
        )


def shape_of(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Returns the shape of the tensor called `name`, () if there is none."""
    return tuple(tensors[name].shape) if name in tensors else ()


def matrix_shapes(
    tensors: Mapping[str, Any], names: Sequence[str], what: str
) -> list[tuple[int, int]]:
    """Returns the shapes of the matrices called `names`, which tell a model's sizes.

    Args:
      what: the model, in words.
    Raises:
      UserError: one of them is missing, or no matrix.
    """
    shapes = [shape_of(tensors, name) for name in names]
    if any(len(shape) != 2 for shape in shapes):
        pairs = ", ".join(f"{n} {s or '(missing)'}" for n, s in zip(names, shapes, strict=True))
        found = ", ".join(list(tensors)[:5]) or "no tensor"
        raise UserError(
            f"expected {what}'s matrices, which tell its sizes, found {pairs} among {len(tensors)} "
            f"tensors ({found}, ...); are all shards there? Else {OTHER_KIND}"
        )
    return [(rows, columns) for rows, columns in shapes]


def count_blocks(tensors: Mapping[str, Any], prefix: str) -> int:
    """Counts the blocks of a network whose tensors are called `prefix`.NUMBER.SOMETHING.

    Raises:
      UserError: a block's number is larger than the file has tensors.
    """
    blocks = (re.match(rf"{re.escape(prefix)}\.([0-9]+)\.", name) for name in tensors)
    # A number longer than any count is not made an integer of: 5,000 digits cannot be.
    counts = [int(match[1]) + 1 if len(match[1]) < 9 else 10**9 for match in blocks if match]
    depth, most = max(counts, default=0), min(len(tensors), MAX_LAYERS)
    if depth > most:
        raise UserError(
            f"expected at most {most} blocks in a file of {len(tensors):,} tensors, found one with "
            f"the number {depth - 1:,} under {prefix}; {OTHER_KIND}"
        )
    return depth


class Folder(NamedTuple):
    """A model folder that was read: its parameters, its config's fields, and its `tower_name`."""

    params: dict[str, Any]
    config: dict[str, Any]
    name: str


def open_folder(
    folder: str | Path, kind: str, *, sharding: Any = None, verify: bool = True
) -> Folder:
    """Reads a model folder made by `python -m convert --kind=KIND`.

    Args:
      sharding, verify: as microdit_jax.checkpoints.model_folder.load_model takes them.
    Raises:
      UserError: not a model folder, of another kind, or damaged.
    """
    params, metadata = load_model(folder, sharding=sharding, verify=verify)
    if metadata["kind"] != kind:
        raise UserError(
            f"expected a model of kind {kind} in {folder}, found {metadata['kind']}; convert one "
            f"with python -m convert --kind={kind}"
        )
    return Folder(params, metadata[kind], tower_name(metadata))


def tower_name(metadata: Mapping[str, Any]) -> str:
    """Returns the name of a tower that was given as a path: its kind and its weights' checksum.

    Datasets carry it to say what made them.

    Args:
      metadata: config.json of its model folder, with the sha256 of the file it was made from.
    """
    kind, weights = metadata["kind"], metadata.get("source", {}).get("sha256", "unknown")[:12]
    if kind != "vae":
        return f"{kind}:weights={weights}"
    # Latents are multiplied by the scaling factor, which is no part of the weights.
    config = metadata[kind]
    about = [
        f"channels={config['latent_channels']}",
        f"scaling_factor={config['scaling_factor']:g}",
    ]
    if shift := config.get("shift_factor"):
        about.append(f"shift_factor={shift:g}")
    if config.get("latents_mean"):
        constants = json.dumps([config["latents_mean"], config["latents_std"]])
        about.append(f"latents_mean_std={hashlib.sha256(constants.encode()).hexdigest()[:8]}")
    return f"{kind}:{','.join(about)},weights={weights}"
