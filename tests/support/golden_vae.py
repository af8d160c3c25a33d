"""The autoencoders that diffusers recorded, with their state dicts."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from microdit_jax.convert.vae import from_torch
from microdit_jax.encoders.vae import VaeConfig
from microdit_jax.encoders.vae_codec import VaeCodec

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
FIELDS = {field.name for field in dataclasses.fields(VaeConfig)}


class GoldenVae:
    """One recorded autoencoder of diffusers; arrays channels last."""

    def __init__(self, name: str):
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file.files}
        self.config_json = json.loads(str(arrays.pop("config")))
        self.config = VaeConfig(**{k: v for k, v in self.config_json.items() if k in FIELDS})
        self.tensors = {
            key.removeprefix("state_dict/"): arrays.pop(key)
            for key in list(arrays)
            if key.startswith("state_dict/")
        }
        self.arrays = {key: np.moveaxis(value, 1, -1) for key, value in arrays.items()}
        self.params = jax.tree.map(jnp.asarray, from_torch(self.tensors, self.config))

    def codec(self, **changes) -> VaeCodec:
        return VaeCodec("golden", self.config, self.params, **changes)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]


@functools.cache
def load_vae(name: str) -> GoldenVae:
    return GoldenVae(name)
