"""Finds a model's files of weights: one file, the shards of an index, a distributed checkpoint."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from microdit_jax.convert.formats.distributed import METADATA, is_distributed
from microdit_jax.convert.formats.file_bytes import LFS
from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json, read_bytes

MAX_CONFIG = 64 << 20  # bytes; an index of shards has a line for each tensor
# The best one first; a variant's index has its name on either side.
KINDS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".pt")
INDICES = {
    **{kind: (f"{kind}.index.json",) for kind in KINDS},
    ".fp16.safetensors": (".fp16.safetensors.index.json", ".safetensors.index.fp16.json"),
    ".fp16.bin": (".fp16.bin.index.json", ".bin.index.fp16.json"),
}
LONE = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # of a file that is a folder's only one


class WeightFiles(NamedTuple):
    """Files that hold a model's weights together, and what there is to say of the choice."""

    files: tuple[Path, ...]
    notes: list[str]


def read_config(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file's object; None if there is no file, or another JSON value in it.

    Raises:
      UserError: it is not JSON, or larger than any config.
    """
    if not path.is_file():
        return None
    return parse_config(read_bytes(path, MAX_CONFIG), path)


def parse_config(text: str | bytes, path: Path) -> dict[str, Any] | None:
    """Parses the text of a config; `path` names the file in errors."""
    if isinstance(text, bytes) and text.startswith(LFS):
        raise UserError(
            f"expected JSON in {visible(path)}, found a Git LFS pointer; fetch the real file: "
            "git lfs pull"
        )
    try:
        contents = parse_json(text)
    except ValueError as error:
        raise UserError(
            f"expected JSON in {visible(path)}, found {visible(error)}; fetch it again"
        ) from error
    return contents if isinstance(contents, dict) else None


def find_weights(path: Path, stems: Sequence[str]) -> WeightFiles | None:
    """Finds the weights of a model; None if a folder has none.

    Args:
      path: a file of weights, the index of shards, a folder with either, or a folder that PyTorch's
        distributed checkpointing wrote.
      stems: names of the weights in a folder, without suffix, the best one first.
    Raises:
      UserError: an index without names of files.
    """
    if path.name == METADATA or path.suffix == ".distcp":
        path = path.parent
    if is_distributed(path):
        shards = sorted(path.glob("*.distcp"))
        held = [file for file in shards if file.stat().st_size]  # a rank may hold nothing
        return WeightFiles((path / METADATA, *held), [f"{len(held)} files of a distributed one"])
    if path.is_dir():
        return _in_folder(path, stems)
    if path.suffix == ".json" and path.is_file():
        return WeightFiles(_shards(path), [f"shards of {path.name}"])
    return WeightFiles((path,), [])


def _in_folder(folder: Path, stems: Sequence[str]) -> WeightFiles | None:
    """Finds the best weights in a folder, as one file or as the shards of an index."""
    for stem in stems:
        for kind in KINDS:
            file = folder / f"{stem}{kind}"
            indices = [folder / f"{stem}{ending}" for ending in INDICES[kind]]
            indices = [index for index in indices if index.is_file()]
            if file.is_file():
                beside = f"; left aside {indices[0].name} and its shards" if indices else ""
                return WeightFiles((file,), [f"weights in {file.name}{beside}"])
            if indices:
                files = _shards(indices[0])
                return WeightFiles(files, [f"weights in {', '.join(file.name for file in files)}"])
    return None


def lone_file(folder: Path) -> WeightFiles | None:
    """Finds the only file of weights in a folder, whatever its name; None of several or none."""
    found = [file for file in sorted(folder.iterdir()) if file.suffix in LONE and file.is_file()]
    return WeightFiles((found[0],), [f"weights in {found[0].name}"]) if len(found) == 1 else None


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index of shards names, in its folder."""
    weight_map = (read_config(index) or {}).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"expected a weight_map of file names in {visible(index)}, found none; fetch it again, "
            "or give the weights' own file or folder"
        )
    # basename: shards outside of this folder are not followed.
    return tuple(index.parent / os.path.basename(name) for name in sorted(set(names)))
