"""Finds the weights and the config.json in what a user points at: a file, or a model's folder."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microdit_jax.convert.formats.file_bytes import map_bytes
from microdit_jax.convert.formats.safetensors_file import looks_like_safetensors, read_safetensors
from microdit_jax.convert.formats.torch_file import read_member
from microdit_jax.convert.kinds import Kind
from microdit_jax.convert.state_dict import StateDict, read_state_dict
from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json, read_bytes, read_json, sha256

CONFIG = "config.json"
NOTE = "microdit_jax"  # what python -m convert --to=torch says of the model in a file it writes
MAX_CONFIG = 64 << 20  # bytes; an index of shards has a line for each tensor
SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".pt")  # the best one first


class Input(NamedTuple):
    """Files of weights, config.json's contents if there is one, and how these were chosen."""

    files: tuple[Path, ...]
    config: dict[str, Any] | None
    config_from: str
    notes: list[str]


def find_input(path: Path, kind: Kind) -> Input:
    """Finds the weights and the config of one model.

    Args:
      path: a file; a folder in the layout of diffusers, transformers or OpenCLIP (config.json and
        weights, whole or in shards with an index); or a pipeline's folder with that inside.
    Raises:
      UserError: a folder without weights, or a config.json that is not JSON.
    """
    if not kind.config_keys:
        config = read_own_config(path, kind.name)
        return Input((path,), config, path.name if config else "", [])
    if not path.is_dir():
        # A config.json of another kind of model beside the file belongs to another file.
        if beside := _find_config(path.parent, kind):
            return Input((path,), *beside, [])
        text = read_note(path, CONFIG)
        config = _parse_config(text, path) if text else None
        return Input((path,), config, path.name if text else "", [])
    for folder in (path, *(path / name for name in kind.subfolders)):
        if files := _weights(folder, kind.stems):
            config, config_from = _find_config(folder, kind) or (None, "")
            notes = [] if folder == path else [f"taken from its folder {folder.name}"]
            notes.append(f"weights in {', '.join(file.name for file in files)}")
            return Input(files, config, config_from, notes)
    wanted = " or ".join(f"{stem}{SUFFIXES[0]}" for stem in kind.stems)
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise UserError(
        f"expected {wanted} (or .bin) in {path} or its folder {' or '.join(kind.subfolders)}, "
        f"found {found}; give the weights' file or folder"
    )


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
    for file in files:
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
    return StateDict(tensors, notes)


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


def read_config(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file's object; None if there is no file, or another JSON value in it.

    Raises:
      UserError: it is not JSON, or larger than any config.
    """
    if not path.is_file():
        return None
    return _parse_config(read_bytes(path, MAX_CONFIG), path)


def _parse_config(text: str | bytes, path: Path) -> dict[str, Any] | None:
    """Parses the text of a config; `path` names the file in errors."""
    try:
        contents = parse_json(text)
    except ValueError as error:
        raise UserError(
            f"expected JSON in {visible(path)}, found {visible(error)}; fetch it again"
        ) from error
    return contents if isinstance(contents, dict) else None


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
    note = _parse_config(text, path) if text else None
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


def _weights(folder: Path, stems: Sequence[str]) -> tuple[Path, ...]:
    """Finds the best weights in a folder, as one file or as the shards of an index."""
    for stem in stems:
        for suffix in SUFFIXES:
            file = folder / f"{stem}{suffix}"
            if file.is_file():
                return (file,)
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                weight_map = (read_config(index) or {}).get("weight_map")
                names = list(weight_map.values()) if isinstance(weight_map, dict) else []
                if not names or not all(isinstance(name, str) for name in names):
                    raise UserError(
                        f"expected a weight_map of file names in {visible(index)}, found none; "
                        "fetch it again"
                    )
                # basename: shards outside of this folder are not followed.
                return tuple(folder / os.path.basename(name) for name in sorted(set(names)))
    return ()
