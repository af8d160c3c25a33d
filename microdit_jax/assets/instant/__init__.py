"""A small trained network that comes with the package, so that an image needs no download.

  pipe = microdit_jax.create_latent_diffusion(checkpoint="instant")

Its folder holds what sampling needs of a training run:

  config.json          the run's: network, noise levels, codec, text encoder, data, attribution
  weights.safetensors  the moving average of the weights alone, in bfloat16
  vae/                 the run's codec
  README.md            the model card
  manifest.json        every file's size and sha256

configs/instant.py trains it, tools/ship_instant.py writes the folder, docs/instant.md shows it.
"""

import os
from pathlib import Path
from typing import Any

import jax

from microdit_jax.checkpoints.model_folder import Params
from microdit_jax.convert.formats.safetensors_file import read_safetensors
from microdit_jax.errors import UserError, visible
from microdit_jax.files import damage, read_json
from microdit_jax.trees import flatten, unflatten

FOLDER = Path(__file__).parent / "model"
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
CONTENTS = ("config.json", WEIGHTS, "vae")  # each with a checksum in the manifest


def is_shipped(folder: str | os.PathLike) -> bool:
    """Returns True if the folder has the layout above."""
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
