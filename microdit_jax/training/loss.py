"""What training minimises: the EDM loss of a batch, and the randomness that it takes.

All randomness of an image is drawn from a key and its place in the batch, so that it is the same
on every mesh and in every micro-batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from microdit_jax import diffusion
from microdit_jax.diffusion import EdmConfig
from microdit_jax.models import masking
from microdit_jax.models.dit import DiT

Batch = dict[str, Array]


class Draws(NamedTuple):
    """Randomness of n images: standard normals for sigma and noise, uniforms for the mask."""

    sigma_normal: Float[Array, " n"]
    noise: Float[Array, "n height width channels"]
    mask_noise: Float[Array, "n t"]


def draw(key: PRNGKeyArray, position: Int[Array, " n"], model: DiT) -> Draws:
    """Draws for the images at these places of the batch, each from a key of its own."""
    cfg = model.config

    def one(position):
        sigma_key, noise_key, mask_key = jax.random.split(jax.random.fold_in(key, position), 3)
        shape = (cfg.input_size, cfg.input_size, cfg.in_channels)
        return Draws(
            jax.random.normal(sigma_key, (), jnp.float32),
            jax.random.normal(noise_key, shape, jnp.float32),
            masking.draw_noise(mask_key, 1, cfg.num_tokens)[0],
        )

    return jax.vmap(one)(position)


def with_position(batch: Batch) -> Batch:
    """The batch with "position" (n,), each image's place in it, if it has none yet."""
    n = batch["latents"].shape[0]
    return {"position": jnp.arange(n, dtype=jnp.int32)} | batch


def batch_loss(
    model: DiT, params: Any, batch: Batch, key: PRNGKeyArray, *, edm: EdmConfig, mask_ratio: float
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """EDM loss of each image of a batch, and its noise level.

    Args:
      batch: "latents" (n, height, width, channels), "caption_latents" (n, l, caption), and
        optionally "keep_caption" (n,), 0 where the caption is dropped (set to zero), and "position"
        (n,) int32, which the image's randomness is drawn from.
      mask_ratio: share of patches dropped after the mixer; static.
    Returns:
      Loss and sigma, each (n,) float32.
    """
    batch = with_position(batch)
    latents, y = batch["latents"], batch["caption_latents"].astype(jnp.float32)
    if "keep_caption" in batch:
        y = y * batch["keep_caption"][:, None, None]
    draws = draw(key, batch["position"], model)
    sigma = diffusion.training_sigma(draws.sigma_normal, edm)

    def network(x, c_noise):
        return model.apply(
            {"params": params}, x, c_noise, y, mask_noise=draws.mask_noise, mask_ratio=mask_ratio
        )

    loss = diffusion.edm_loss(
        network,
        latents,
        draws.noise,
        sigma,
        sigma_data=edm.sigma_data,
        patch_size=model.config.patch_size,
    )
    return loss, sigma
