"""Finds the state dict in what a checkpoint file holds, whatever wraps it."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microdit_jax.convert import holdings
from microdit_jax.convert.formats.distributed import METADATA, DistributedCheckpoint
from microdit_jax.convert.formats.file_bytes import map_bytes
from microdit_jax.convert.formats.safetensors_file import looks_like_safetensors, read_safetensors
from microdit_jax.convert.formats.torch_file import TorchFile
from microdit_jax.convert.formats.torch_values import LeftAside
from microdit_jax.errors import UserError, visible

# Parts that data parallelism, torch.compile, FSDP and activation checkpointing insert into names.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Attributes under which training programs keep the network, so that all its names begin with them.
OUTER = ("model", "net", "network", "generator", "online_model", "ema_model")
# Constants of the network, which an average of the trained weights alone lacks.
CONSTANTS = ("pos_embed", "mask_token")


class StateDict(NamedTuple):
    """Named tensors, and notes of what was unwrapped or left out to find them."""

    tensors: dict[str, np.ndarray]
    notes: list[str]


class Found(NamedTuple):
    """A state dict in a checkpoint's contents.

    Attributes:
      unread: tensors of kinds that are not supported: name -> which, in words.
    """

    tensors: dict[str, np.ndarray]
    notes: list[str]
    unread: dict[str, str]


def find_tensors(contents: Any, path: str = "the checkpoint", weights: str | None = None) -> Found:
    """Finds a mapping of names to tensors inside the contents of a checkpoint.

    Args:
      path: the checkpoint, for errors.
      weights: which, if it holds several; see holdings.choose.

    Raises:
      UserError: there is none, or it is not clear which.
    """
    held = holdings.find_holdings(contents)
    chosen = holdings.choose(held, weights, path)
    if chosen is not None:
        notes = holdings.describe_choice(chosen, held)
        if chosen.others and (beside := _unlisted(chosen, held)):
            shown = ", ".join(visible(name, 100) for name in beside[:5])
            notes.append(f"ignored what is not a tensor: {shown}")
        tensors = dict(chosen.tensors)
        raw = next((h for h in held if h.role == holdings.RAW), None)
        if chosen.role == holdings.EMA and raw is not None:
            notes += _complete(tensors, raw.tensors)
        arrays = {name: t for name, t in tensors.items() if isinstance(t, np.ndarray)}
        unread = {name: t.what for name, t in tensors.items() if isinstance(t, LeftAside)}
        return Found(arrays, notes, unread)
    if isinstance(contents, Mapping):
        keys_found = [key for key in contents if isinstance(key, str | int)][:8]
        shown = "[" + ", ".join(repr(visible(key, 100)) for key in keys_found) + "]"
    elif isinstance(contents, LeftAside):
        shown = contents.what
    else:
        shown = type(contents).__name__
    raise UserError(
        f"expected a state dict (raw, under 'state_dict' or under 'state.model') in "
        f"{visible(path)}, found {shown}; save it with torch.save(model.state_dict(), FILE)"
    )


def _unlisted(chosen: holdings.Holding, held: list[holdings.Holding]) -> list[str]:
    """Returns the keys beside a state dict that hold no weights of their own."""
    start = f"{chosen.path}." if chosen.path else ""
    listed = [holding.path for holding in held if holding.has_weights]
    return [
        key
        for key in chosen.others
        if not any(f"{path}.".startswith(f"{start}{key}.") for path in listed)
    ]


def _complete(average: dict[str, Any], raw: Mapping[str, Any]) -> list[str]:
    """Adds the constants that an average lacks from the raw weights; returns notes of it."""
    # Names may be wrapped in one and bare in the other.
    present = {_unwrap(name).split(".")[-1] for name in average}
    missing = {n: t for n, t in raw.items() if _unwrap(n).split(".")[-1] in CONSTANTS}
    missing = {n: t for n, t in missing.items() if _unwrap(n).split(".")[-1] not in present}
    wrapped_in = [n for n in average if _unwrap(n).endswith("x_embedder.proj.weight")]
    if not missing or not wrapped_in:
        return []
    start = wrapped_in[0].removesuffix("x_embedder.proj.weight")
    for name, tensor in missing.items():
        average[start + _unwrap(name).split(".")[-1]] = tensor
    return [f"{', '.join(sorted(missing))} taken from the raw weights, as the average has none"]


class _Selection(NamedTuple):
    """Names of one model's tensors without what wraps them, and notes of what was left out."""

    short: dict[str, str]  # name -> bare name
    notes: list[str]


def _select(names: Iterable[str], part: str | None) -> _Selection:
    """Selects the tensors of `part`, as strip_prefixes does, by their names."""
    bare = {name: _unwrap(name) for name in names}
    notes = []
    if counted := [name for name, short in bare.items() if short == "n_averaged"]:
        bare = {name: short for name, short in bare.items() if name not in counted}
        notes.append("an average of torch's AveragedModel; left out its count, n_averaged")
    inner = {name: _without_outer(short) for name, short in bare.items()}
    prefix = f"{part}." if part else ""
    if prefix and any(short.startswith(prefix) for short in inner.values()):
        bare = inner
    else:
        tops = {short.split(".")[0] for short in bare.values()}
        outer = [top for top in tops if top in OUTER]
        whole = len(tops) == 1 or part is not None  # other kinds have no more networks beside
        prefix = f"{outer[0]}." if len(outer) == 1 and whole else ""
    result, aside = {}, Counter()
    for name, short in bare.items():
        if short.startswith(prefix):
            result[name] = short.removeprefix(prefix)
        else:
            aside[short.split(".")[0]] += 1
    notes += [f"names unwrapped from {prefix}"] if prefix else []
    notes += [f"ignored {count} tensors of {visible(top, 100)}." for top, count in aside.items()]
    return _Selection(result, notes)


def strip_prefixes(tensors: Mapping[str, np.ndarray], part: str | None = None) -> StateDict:
    """Removes the names' wrappers, and selects one part of a larger model.

    Args:
      tensors: names with `module.` and `_orig_mod.` anywhere, before the part or inside it.
      part: the name of the wanted sub-module ("dit", perhaps inside `model.`); when some names
        have it, the others are left aside and this is noted. When none has, all are its own.
    Raises:
      UserError: two tensors end up with one name.
    """
    selection = _select(tensors, part)
    result: dict[str, np.ndarray] = {}
    doubled = []
    for name, short in selection.short.items():
        if short in result:
            doubled.append(short)
        result[short] = tensors[name]
    if doubled:
        raise UserError(
            "expected every tensor once, found more than one for "
            f"{visible(', '.join(doubled))}; save the state dict of one model"
        )
    return StateDict(result, selection.notes)


def _refuse_unread(unread: Mapping[str, str], part: str | None, selected: Mapping) -> None:
    """Raises UserError if a tensor of a kind that is not supported belongs to the model.

    Args:
      part: as strip_prefixes takes it.
      selected: the tensors before names were unwrapped.
    """
    short = _select((*selected, *unread), part).short
    wanted = [name for name in unread if name in short]
    if wanted:
        shown = ", ".join(f"{visible(name, 200)} ({unread[name]})" for name in wanted[:5])
        raise UserError(
            f"expected dense tensors of real numbers, found {len(wanted)} of kinds that are not "
            f"supported: {shown}; save them dense, in float32, float16 or bfloat16"
        )


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _without_outer(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in OUTER:
        parts = parts[1:]
    return ".".join(parts)


def read_state_dict(
    path: str | os.PathLike, part: str | None = None, weights: str | None = None
) -> StateDict:
    """Reads a .pt, .bin or .safetensors file (told apart by content) and unwraps its tensors.

    A distributed checkpoint is named by its file .metadata.

    Args:
      part: see strip_prefixes.
      weights: which, if it holds several; see holdings.choose.
    Raises:
      UserError: the file cannot be read, or holds no state dict.
    """
    map_bytes(path)  # raises unless it exists and is not empty
    if Path(path).name == METADATA:
        file = DistributedCheckpoint(Path(path).parent)
        found = find_tensors(file.contents, str(path), weights)
        stripped = strip_prefixes(found.tensors, part)
        tensors = {name: file.load(tensor) for name, tensor in stripped.tensors.items()}
        return StateDict(tensors, file.notes + found.notes + stripped.notes)
    if Path(path).suffix == ".safetensors" or looks_like_safetensors(path):
        found = find_tensors(read_safetensors(path)[0], str(path), weights)
        stripped = strip_prefixes(found.tensors, part)
        return StateDict(stripped.tensors, found.notes + stripped.notes)
    file = TorchFile(path)
    found = find_tensors(file.contents, str(path), weights)
    _refuse_unread(found.unread, part, found.tensors)
    stripped = strip_prefixes(found.tensors, part)
    file.verify(stripped.tensors.values())  # those alone: an optimiser's bytes are not read
    return StateDict(stripped.tensors, file.notes + found.notes + stripped.notes)
