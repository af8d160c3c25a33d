"""Reads the weights of a folder in the layout of the models in the package (assets/instant)."""

import os
from pathlib import Path
from typing import Any

import jax

from microdit_jax.checkpoints.model_folder import Params
from microdit_jax.convert.formats.safetensors_file import read_safetensors
from microdit_jax.errors import UserError, visible
from microdit_jax.files import damage, read_json
from microdit_jax.trees import flatten, unflatten

_PACKAGE = Path(__file__).parent.parent
# Of the models in the package by name, which "microdit_jax/" may stand before
FOLDERS = {
    "instant": _PACKAGE / "assets" / "instant" / "model",
    "instant2": _PACKAGE / "assets" / "instant" / "model2",
}
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
CONTENTS = ("config.json", WEIGHTS, "vae")  # each with a checksum in the manifest


def find_shipped(path: Path) -> Path:
    """Returns the folder of a model in the package for its name, and other paths as they are."""
    name = path.as_posix().removeprefix(f"{_PACKAGE.name}/")
    return FOLDERS[name] if name in FOLDERS and not path.exists() else path


def is_shipped(folder: str | os.PathLike) -> bool:
    """Returns True if the folder has the layout of the models in the package."""
    return all((Path(folder) / name).is_file() for name in ("config.json", WEIGHTS, MANIFEST))


def load_params(folder: str | os.PathLike, abstract_params: Any) -> Params:
    """Reads the weights, after comparing each file with its checksum.

    Args:
      abstract_params: shapes, types and shardings of the network's parameters.
    Raises:
      UserError: a file is missing or damaged, or the weights are not this network's.
    """
    folder, expected = Path(folder), flatten(abstract_params)
    if faults := damage(folder, read_json(folder / MANIFEST), complete=CONTENTS):
        raise UserError(
            f"expected the files of {visible(folder)} as they were shipped, found damage in "
            f"{', '.join(faults[:20])}; install microdit_jax again"
        )
    arrays, _ = read_safetensors(folder / WEIGHTS)
    shapes = {path: leaf.shape for path, leaf in expected.items()}
    found = {path: array.shape for path, array in arrays.items()}
    if differing := sorted(dict(found.items() ^ shapes.items())):
        raise UserError(
            f"expected the weights of the network in {folder}/config.json, found others "
            f"({len(differing)} differ, the first is {differing[0]}); install microdit_jax again"
        )
    return unflatten(
        {
            path: jax.device_put(arrays[path].astype(leaf.dtype), leaf.sharding)
            for path, leaf in expected.items()
        }
    )
