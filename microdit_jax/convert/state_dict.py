"""Finds the state dict in what a checkpoint file holds, whatever wraps it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microdit_jax.convert.formats.file_bytes import map_bytes
from microdit_jax.convert.formats.safetensors_file import looks_like_safetensors, read_safetensors
from microdit_jax.convert.formats.torch_file import read_torch
from microdit_jax.errors import UserError

# Keys under which a state dict may lie: the training framework's, one level down, or none.
NESTINGS = (("state", "model"), ("state_dict",), ("model",), ("module",), ())
# Parts that data parallelism, torch.compile and FSDP insert into names.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")


class StateDict(NamedTuple):
    """Named tensors, and notes of what was unwrapped or left out to find them."""

    tensors: dict[str, np.ndarray]
    notes: list[str]


def find_tensors(contents: Any, path: str = "the checkpoint") -> StateDict:
    """Finds the mapping of names to tensors inside the contents of a checkpoint.

    Args:
      path: the checkpoint, for errors.

    Raises:
      UserError: there is none.
    """
    for keys in NESTINGS:
        found = contents
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and any(isinstance(v, np.ndarray) for v in found.values()):
            tensors = {str(k): v for k, v in found.items() if isinstance(v, np.ndarray)}
            others = [str(k) for k in found if not isinstance(found[k], np.ndarray)]
            notes = [f"state dict found under {'.'.join(keys)}"] if keys else []
            if others:
                notes.append(f"ignored what is not a tensor: {', '.join(others[:5])}")
            return StateDict(tensors, notes)
    found = list(contents)[:8] if isinstance(contents, Mapping) else type(contents).__name__
    raise UserError(
        f"expected a state dict (raw, under 'state_dict' or under 'state.model') in {path}, "
        f"found {found}; save it with torch.save(model.state_dict(), FILE)"
    )


def strip_prefixes(tensors: Mapping[str, np.ndarray], part: str | None = None) -> StateDict:
    """Removes the names' wrappers, and selects one part of a larger model.

    Args:
      tensors: names with `module.` and `_orig_mod.` anywhere, before the part or inside it.
      part: the name of the wanted sub-module ("dit"); when some names have it, the others are
        left aside and this is noted. When none has, all are taken as its own.
    Raises:
      UserError: two tensors end up with one name.
    """
    prefix = f"{part}." if part else ""
    bare = {name: _unwrap(name) for name in tensors}
    selected = any(prefix and name.startswith(prefix) for name in bare.values())
    result: dict[str, np.ndarray] = {}
    aside: dict[str, int] = {}
    doubled = []
    for name, short in bare.items():
        if selected and not short.startswith(prefix):
            top = short.split(".")[0]
            aside[top] = aside.get(top, 0) + 1
            continue
        short = short.removeprefix(prefix) if selected else short
        if short in result:
            doubled.append(short)
        result[short] = tensors[name]
    if doubled:
        raise UserError(
            f"expected every tensor once, found more than one for {', '.join(doubled)}; "
            "save the state dict of one model"
        )
    notes = [f"names unwrapped from {prefix}"] if selected else []
    notes += [f"ignored {count} tensors of {top}." for top, count in aside.items()]
    return StateDict(result, notes)


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def read_state_dict(path: str | os.PathLike, part: str | None = None) -> StateDict:
    """Reads a .pt, .bin or .safetensors file (told apart by content) and unwraps its tensors.

    Args:
      part: see strip_prefixes.
    Raises:
      UserError: the file cannot be read, or holds no state dict.
    """
    map_bytes(path)  # raises unless it exists and is not empty
    if Path(path).suffix == ".safetensors" or looks_like_safetensors(path):
        found = StateDict(read_safetensors(path)[0], [])
    else:
        found = find_tensors(read_torch(path), str(path))
    stripped = strip_prefixes(found.tensors, part)
    return StateDict(stripped.tensors, found.notes + stripped.notes)
