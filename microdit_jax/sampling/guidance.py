"""Classifier-free guidance (Ho and Salimans 2022): its default scale, and the guided network."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from microdit_jax.diffusion import Latents, Network
from microdit_jax.towers import TextEncoder

REFERENCE_SCALE = 5.0  # MicroDiT's own, for photographs and pretrained text encoders
EMOJI_SCALE = 3.0  # for networks trained on the embedded emoji images


def default_scale(text_encoder: TextEncoder) -> float:
    """Returns the guidance scale to begin with.

    It goes by the network's text encoder: a random token table is only used by networks that were
    trained on the embedded emoji images.
    """
    return REFERENCE_SCALE if text_encoder.pretrained else EMOJI_SCALE


def is_guided(guidance_scale: float) -> bool:
    """Returns True for scales that take the doubled batch; 1 or less means no guidance."""
    return guidance_scale > 1


def guided(network: Network, guidance_scale: Float[Array, ""] | float) -> Network:
    """Classifier-free guidance: F_uncond + g (F_cond - F_uncond), from one doubled batch.

    Args:
      network: takes 2n latents; rows 2i get image i's caption, rows 2i + 1 the zero caption (see
        `interleave`: a batch split over devices keeps both rows of an image together).
      guidance_scale: g; may be traced, so that another value compiles nothing. Unless
        `is_guided(g)`, the reference does not guide at all: then do not wrap.
    """

    def network_with_guidance(x: Latents, c_noise: Float[Array, " n"]) -> Latents:
        F_both = network(interleave(x, x), interleave(c_noise, c_noise)).astype(jnp.float32)
        F_both = F_both.reshape(x.shape[0], 2, *x.shape[1:])  # (n, 2, height, width, channels)
        F_cond, F_uncond = F_both[:, 0], F_both[:, 1]
        return F_uncond + guidance_scale * (F_cond - F_uncond)

    return network_with_guidance


def interleave(first: Float[Array, "n *s"], second: Float[Array, "n *s"]) -> Float[Array, "m *s"]:
    """Alternates rows: first[0], second[0], first[1], second[1], ..., (2n, ...)."""
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])
