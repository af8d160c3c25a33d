"""The EDM loss of a batch, which training minimises, and its randomness.

All randomness of an image is a function of a key and the image's position in the global batch, so
that it is the same on every mesh and in every micro-batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from microdit_jax import diffusion
from microdit_jax.diffusion import EdmConfig
from microdit_jax.models import masking
from microdit_jax.models.dit import DiT, DiTConfig

Batch = dict[str, Array]


class Randomness(NamedTuple):
    """Randomness of n images: standard normals for sigma and noise, uniforms for the mask."""

    sigma_normal: Float[Array, " n"]
    noise: Float[Array, "n height width channels"]
    mask_noise: Float[Array, "n t"]


def sample_randomness(
    key: PRNGKeyArray, position: Int[Array, " n"], config: DiTConfig
) -> Randomness:
    """Samples the randomness of the images at these positions, each from a key of its own."""

    def of_image(position):
        sigma_key, noise_key, mask_key = jax.random.split(jax.random.fold_in(key, position), 3)
        shape = (config.input_size, config.input_size, config.in_channels)
        return Randomness(
            jax.random.normal(sigma_key, (), jnp.float32),
            jax.random.normal(noise_key, shape, jnp.float32),
            masking.uniform_noise(mask_key, 1, config.num_tokens)[0],
        )

    return jax.vmap(of_image)(position)


def with_position(batch: Batch) -> Batch:
    """Adds "position" (n,), each image's index in the global batch, unless the batch has it.

    To be called on the whole batch, before it is split over devices or micro-batches.
    """
    n = batch["latents"].shape[0]
    return {"position": jnp.arange(n, dtype=jnp.int32)} | batch


def batch_loss(
    model: DiT, params: Any, batch: Batch, key: PRNGKeyArray, *, edm: EdmConfig, mask_ratio: float
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """EDM loss of each image of a batch, and its noise level.

    Args:
      batch: "latents" (n, height, width, channels), "caption_latents" (n, l, caption), "position"
        (n,) int32, each image's index in the global batch, and optionally "keep_caption" (n,), 0
        where the caption is dropped (set to zero).
      mask_ratio: share of patches dropped after the mixer; static.
    Returns:
      Loss and sigma, each (n,) float32.
    Raises:
      ValueError: the batch has no "position". Counting rows here would give the same noise to every
        device and every micro-batch.
    """
    if "position" not in batch:
        raise ValueError(
            f'batch_loss expects batch["position"], found {", ".join(sorted(batch))}; call '
            "with_position on the whole batch, before it is split over devices"
        )
    y = batch["caption_latents"].astype(jnp.float32)  # (n, l, caption)
    if "keep_caption" in batch:
        y = y * batch["keep_caption"][:, None, None]
    random = sample_randomness(key, batch["position"], model.config)
    sigma = diffusion.training_sigma(random.sigma_normal, edm)  # (n,)

    def network(x, c_noise):
        return model.apply(
            {"params": params}, x, c_noise, y, mask_noise=random.mask_noise, mask_ratio=mask_ratio
        )

    loss = diffusion.edm_loss(
        network,  # pyright: ignore[reportArgumentType]  (Flax: with state, which there is none of)
        batch["latents"],
        random.noise,
        sigma,
        sigma_data=edm.sigma_data,
        patch_size=model.config.patch_size,
    )
    return loss, sigma
