"""Small trained networks that come with the package, so that an image needs no download.

  pipe = microdit_jax.create_latent_diffusion(checkpoint="instant")

"instant" lies in model/, "instant2", the second edition, in model2/. A folder holds what sampling
needs of a training run:

  config.json          the run's: network, noise levels, codec, text encoder, data, attribution
  weights.safetensors  the moving average of the weights alone, in bfloat16
  vae/                 the run's codec
  README.md            the model card
  manifest.json        every file's size and sha256

configs/instant.py and configs/instant2.py train them, tools/ship_instant.py writes the folders,
docs/instant.md and docs/instant2.md show them.
"""

from microdit_jax.convert.shipped import (
    FOLDERS,
    MANIFEST,
    WEIGHTS,
    find_shipped,
    is_shipped,
    load_params,
)

__all__ = ["FOLDERS", "MANIFEST", "WEIGHTS", "find_shipped", "is_shipped", "load_params"]
