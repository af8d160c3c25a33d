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

from microdit_jax.convert.shipped import (
    FOLDER,
    MANIFEST,
    WEIGHTS,
    find_shipped,
    is_shipped,
    load_params,
)

__all__ = ["FOLDER", "MANIFEST", "WEIGHTS", "find_shipped", "is_shipped", "load_params"]
