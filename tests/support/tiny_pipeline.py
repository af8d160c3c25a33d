"""A pipeline of tiny networks with random weights, on one device or a mesh."""

import functools

import jax
import jax.numpy as jnp
from conftest import tiny_model

from microdit_jax import sharding
from microdit_jax.assets import load
from microdit_jax.diffusion import EdmConfig
from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.encoders.vae import AutoencoderKL, VaeConfig
from microdit_jax.encoders.vae_codec import VaeCodec
from microdit_jax.sampling.pipeline import LatentDiffusion

PROMPTS = ["red apple", "dog face", "woman mechanic", "red apple", "a", "b c", "cat", "sun"]
OPTIONS = {"num_inference_steps": 2, "seed": 3, "guidance_scale": 2.0}
VAE = VaeConfig((8, 8), 4, 0.5, norm_num_groups=4)


@functools.cache
def weights():
    """Random weights of the tiny network and a VAE, none of them zero."""
    model, keys = tiny_model(), jax.random.split(jax.random.key(0), 3)
    shapes = load.abstract_params(model.config)
    leaves, tree = jax.tree.flatten(shapes)
    normals = [
        0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(jax.random.split(keys[0], len(leaves)), leaves, strict=True)
    ]
    images = jnp.zeros((1, 4, 4, 3), jnp.float32)
    return tree.unflatten(normals), AutoencoderKL(VAE).init(keys[1], images)["params"]


def pipeline(mesh=None) -> LatentDiffusion:
    model, (params, vae) = tiny_model(), weights()
    if mesh is not None:
        params = jax.device_put(params, sharding.shardings(params, mesh))
        vae = jax.device_put(vae, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    codec = VaeCodec("vae", VAE, vae)
    return LatentDiffusion(model, params, EdmConfig(), TokenTable(24, 7, 0), codec, "tiny")
