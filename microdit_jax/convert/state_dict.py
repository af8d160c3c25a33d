"""Finds the state dict in what a checkpoint file holds, whatever wraps it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microdit_jax.convert.formats.file_bytes import map_bytes
from microdit_jax.convert.formats.safetensors_file import looks_like_safetensors, read_safetensors
from microdit_jax.convert.formats.torch_file import TorchFile
from microdit_jax.convert.formats.torch_values import LeftAside
from microdit_jax.errors import UserError, visible

# Keys under which a state dict may lie: the training framework's, one level down, or none.
NESTINGS = (("state", "model"), ("state_dict",), ("model",), ("module",), ())
# Parts that data parallelism, torch.compile and FSDP insert into names.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")


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


def find_tensors(contents: Any, path: str = "the checkpoint") -> Found:
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
        if isinstance(found, Mapping) and any(map(_is_tensor, found.values())):
            tensors = {str(k): v for k, v in found.items() if isinstance(v, np.ndarray)}
            others = [str(k) for k in found if not isinstance(found[k], np.ndarray)]
            notes = [f"state dict found under {'.'.join(keys)}"] if keys else []
            unread = {
                str(name): value.what
                for name, value in found.items()
                if _is_tensor(value) and isinstance(value, LeftAside)
            }
            if ignored := [name for name in others if name not in unread]:
                shown = ", ".join(visible(name, 100) for name in ignored[:5])
                notes.append(f"ignored what is not a tensor: {shown}")
            return Found(tensors, notes, unread)
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


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (isinstance(value, LeftAside) and value.is_tensor)


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
            "expected every tensor once, found more than one for "
            f"{visible(', '.join(doubled))}; save the state dict of one model"
        )
    notes = [f"names unwrapped from {prefix}"] if selected else []
    notes += [f"ignored {count} tensors of {visible(top, 100)}." for top, count in aside.items()]
    return StateDict(result, notes)


def _refuse_unread(unread: Mapping[str, str], part: str | None, selected: Mapping) -> None:
    """Raises UserError if a tensor of a kind that is not supported belongs to the model.

    Args:
      part: as strip_prefixes takes it.
      selected: the tensors before names were unwrapped.
    """
    prefix = f"{part}." if part else ""
    if not any(prefix and _unwrap(name).startswith(prefix) for name in (*selected, *unread)):
        prefix = ""
    wanted = [name for name in unread if _unwrap(name).startswith(prefix)]
    if wanted:
        shown = ", ".join(f"{visible(name, 200)} ({unread[name]})" for name in wanted[:5])
        raise UserError(
            f"expected dense tensors of real numbers, found {len(wanted)} of kinds that are not "
            f"supported: {shown}; save them dense, in float32, float16 or bfloat16"
        )


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
        return strip_prefixes(read_safetensors(path)[0], part)
    file = TorchFile(path)
    found = find_tensors(file.contents, str(path))
    _refuse_unread(found.unread, part, found.tensors)
    stripped = strip_prefixes(found.tensors, part)
    file.verify(stripped.tensors.values())  # those alone: an optimiser's bytes are not read
    return StateDict(stripped.tensors, file.notes + found.notes + stripped.notes)
