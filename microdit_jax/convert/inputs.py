"""Finds the weights and the config.json in what a user points at: a file, or a model's folder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microdit_jax.convert.formats.distributed import METADATA
from microdit_jax.convert.formats.file_bytes import map_bytes
from microdit_jax.convert.formats.safetensors_file import looks_like_safetensors, read_safetensors
from microdit_jax.convert.formats.torch_file import read_member
from microdit_jax.convert.kinds import Kind, get_kind
from microdit_jax.convert.scaled import apply_scales
from microdit_jax.convert.state_dict import StateDict, read_state_dict
from microdit_jax.convert.weight_files import (
    KINDS,
    WeightFiles,
    find_weights,
    lone_file,
    parse_config,
    read_config,
)
from microdit_jax.errors import UserError, visible
from microdit_jax.files import read_json, sha256

CONFIG = "config.json"
NOTE = "microdit_jax"  # what python -m convert --to=torch says of the model in a file it writes


class Input(NamedTuple):
    """Files of weights, config.json's contents if there is one, and how these were chosen."""

    files: tuple[Path, ...]
    config: dict[str, Any] | None
    config_from: str
    notes: list[str]


def find_input(path: Path, kind: Kind) -> Input:
    """Finds the weights and the config of one model.

    Args:
      path: a file; the index of shards; a folder in the layout of diffusers, transformers or
        OpenCLIP (config.json and weights, whole or in shards with an index); a pipeline's folder
        with that inside; or a folder that PyTorch's distributed checkpointing wrote.
    Raises:
      UserError: a folder without weights, or a config.json that is not JSON.
    """
    if not path.is_dir():
        found = find_weights(path, kind.stems) or WeightFiles((path,), [])
        if not kind.config_keys:
            config = read_own_config(path, kind.name) if found.files == (path,) else None
            return Input(found.files, config, path.name if config else "", found.notes)
        # A config.json of another kind of model beside the file belongs to another file.
        if beside := _find_config(path.parent, kind):
            return Input(found.files, *beside, found.notes)
        text = read_note(path, CONFIG) if found.files == (path,) else None
        config = parse_config(text, path) if text else None
        return Input(found.files, config, path.name if text else "", found.notes)
    for folder in (path, *(path / name for name in kind.subfolders)):
        if found := find_weights(folder, kind.stems):
            return _of_folder(path, folder, found, kind)
    if not kind.config_keys and (found := lone_file(path)):
        return _of_folder(path, path, found, kind)
    wanted = " or ".join(f"{stem}{KINDS[0]}" for stem in kind.stems)
    inside = f" or its folder {' or '.join(kind.subfolders)}" if kind.subfolders else ""
    shown = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise UserError(
        f"expected {wanted or 'a file of weights'} (or .bin) in {visible(path)}{inside}, found "
        f"{visible(shown)}; give the weights' file or folder"
    )


def holds_weights(folder: Path, kind: str = "dit") -> bool:
    """Returns True for a folder in which find_input finds a kind's weights by name."""
    return folder.is_dir() and find_weights(folder, get_kind(kind).stems) is not None


def _of_folder(path: Path, folder: Path, found: WeightFiles, kind: Kind) -> Input:
    """Makes the input of weights that lie in a folder: `path` itself, or one inside it."""
    if kind.config_keys:
        config, config_from = _find_config(folder, kind) or (None, "")
    else:
        one = found.files[0] if len(found.files) == 1 else None
        config = read_own_config(one, kind.name) if one else None
        config_from = str(one) if config else ""
    notes = [] if folder == path else [f"taken from its folder {folder.name}"]
    return Input(found.files, config, config_from, notes + found.notes)


def _find_config(folder: Path, kind: Kind) -> tuple[dict[str, Any], str] | None:
    """Reads the config that describes a kind's model in a folder: its contents and path."""
    for file in (folder / name for name in kind.config_files):
        config = read_config(file)
        if config and set(kind.config_keys) & set(config):
            return config, str(file)
    return None


def read_tensors(files: Sequence[Path], part: str | None, weights: str | None = None) -> StateDict:
    """Reads the tensors of all files together; `part` and `weights` as for read_state_dict.

    Raises:
      UserError: a file cannot be read, or a tensor is in two of them.
    """
    tensors: dict[str, np.ndarray] = {}
    notes: list[str] = []
    # The files of a distributed checkpoint are read through the first, which describes them.
    for file in files[:1] if files[0].name == METADATA else files:
        found = read_state_dict(file, part, weights)
        doubled = [name for name in found.tensors if name in tensors]
        if doubled:
            raise UserError(
                f"expected every tensor once, found {visible(', '.join(doubled[:5]))} again in "
                f"{visible(file)}; "
                "remove what is not part of the model"
            )
        tensors |= found.tensors
        notes += [note for note in found.notes if note not in notes]
    tensors, scaled = apply_scales(tensors)
    return StateDict(tensors, notes + scaled)


def describe_source(files: Sequence[Path]) -> dict[str, Any]:
    """Returns name, size and checksum of the weights; for several files, of all checksums."""
    for file in files:
        map_bytes(file)  # raises unless it exists and is not empty
    digests = [sha256(file) for file in files]
    digest = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode())
    return {
        "file": ", ".join(file.name for file in files),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": digest if isinstance(digest, str) else digest.hexdigest(),
    }


def read_note(path: Path, name: str) -> str | None:
    """Reads a note that python -m convert wrote into a file beside its tensors; None if none."""
    if not path.is_file() or path.stat().st_size < 9:
        return None
    if path.suffix == ".safetensors" or looks_like_safetensors(path):
        return read_safetensors(path)[1].get(name)
    raw = read_member(path, f"archive/extra/{name}")
    if raw is None:
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"expected text in the note {name} of {visible(path)}, found {error}"
        ) from error


def read_own_config(path: Path, kind: str) -> dict[str, Any] | None:
    """Reads the config's fields from a file that python -m convert wrote; None for other files.

    Raises:
      UserError: the file was made from a model of another kind.
    """
    text = read_note(path, NOTE)
    note = parse_config(text, path) if text else None
    if note is None or "config" not in note:
        return None
    if note.get("kind") != kind or not isinstance(note["config"], dict):
        raise UserError(
            f"expected a model of kind {kind} in {visible(path)}, found "
            f"{visible(note.get('kind'), 60)}; give "
            f"python -m convert --kind={visible(note.get('kind'), 60)}"
        )
    return note["config"]


def read_stated_config(path: Path, kind: str) -> dict[str, Any]:
    """Reads the config of --config: a JSON object of its own, or a model folder's config.json.

    Raises:
      UserError: no such file, or something else in it.
    """
    try:
        contents = read_json(path)
    except OSError as error:
        raise UserError(
            f"expected JSON of a config at {visible(path)}, found {error.strerror}; check the path"
        ) from error
    stated = contents.get(kind, contents)
    if not isinstance(stated, dict):
        raise UserError(
            f"expected a JSON object under {kind} in {visible(path)}, found {type(stated).__name__}"
        )
    return stated
