"""Guidance: which network evaluations it takes, and how their results are combined."""

import enum
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from microdit_jax import diffusion
from microdit_jax.diffusion import Latents, Network
from microdit_jax.towers import TextEncoder

REFERENCE_SCALE = 5.0  # MicroDiT's own, for photographs and pretrained text encoders
EMOJI_SCALE = 3.0  # for networks trained on the embedded emoji images
CFGPP_SCALE = 0.6  # of CFG++, whose scale is an interpolation's

KINDS = ("cfg", "interval", "apg", "cfgpp", "auto")


class Form(enum.Enum):
    """Programs of one network evaluation: which captions it takes, and what it makes of them."""

    CONDITIONAL = "conditional"  # the caption alone
    UNCONDITIONAL = "unconditional"  # the zero caption, or the negative prompt, alone
    GUIDED = "guided"  # both, in a doubled batch, for classifier-free guidance
    ADJUSTED = "adjusted"  # both, for guidance with a projection or a rescaling
    AUTO = "auto"  # the caption alone, by two networks, for autoguidance

    @property
    def passes(self) -> int:
        """Passes of the network that one image takes."""
        return 2 if self in (Form.GUIDED, Form.ADJUSTED, Form.AUTO) else 1

    @property
    def captions(self) -> int:
        """Captions that its program takes for each image."""
        return 2 if self in (Form.GUIDED, Form.ADJUSTED) else 1


class Strength(NamedTuple):
    """Numbers that guidance takes, traced, so that others compile nothing.

    Attributes:
      scale: g of classifier-free guidance.
      rescale: phi, from 0 to 1: how far the deviation of the result is brought back to that of the
        conditional one.
      parallel, momentum, norm: of APG: eta, beta, and the bound r of the difference's norm, 0 for
        none.
    """

    scale: Float[Array, ""] | float
    rescale: Float[Array, ""] | float = 0.0
    parallel: Float[Array, ""] | float = 1.0
    momentum: Float[Array, ""] | float = 0.0
    norm: Float[Array, ""] | float = 0.0

    def as_float32(self) -> "Strength":
        """Returns the numbers as a compiled program takes them."""
        numbers: Any = [np.float32(number) for number in self]
        return Strength(*numbers)


def default_scale(
    text_encoder: TextEncoder, kind: str = "cfg", recorded: float | None = None
) -> float:
    """Returns the guidance scale to begin with.

    It goes by the network's text encoder: a random token table is only used by networks that were
    trained on the embedded emoji images.

    Args:
      recorded: the scale that the network's own run samples with; None: it does not say.
    """
    if kind == "cfgpp":
        return CFGPP_SCALE
    if recorded is not None:
        return recorded
    return REFERENCE_SCALE if text_encoder.pretrained else EMOJI_SCALE


def guided(network: Network, guidance_scale: Float[Array, ""] | float) -> Network:
    """Classifier-free guidance (Ho and Salimans 2022): F_uncond + g (F_cond - F_uncond).

    Args:
      network: takes 2n latents; rows 2i get image i's caption, rows 2i + 1 the zero caption or the
        negative prompt (see `interleave`: a batch split over devices keeps both rows of an image
        together).
      guidance_scale: g; may be traced, so that another value compiles nothing.
    """

    def network_with_guidance(x: Latents, c_noise: Float[Array, " n"]) -> Latents:
        F_cond, F_uncond = _both(network, x, c_noise)
        return F_uncond + guidance_scale * (F_cond - F_uncond)

    return network_with_guidance


def autoguided(network: Network, weaker: Network, scale: Float[Array, ""] | float) -> Network:
    """Autoguidance (Karras et al. 2024, arXiv 2406.02507, equation 3): F_weak + g (F - F_weak).

    Args:
      weaker: a network that was trained less, with the same caption.
      scale: g; may be traced.
    """

    def network_with_guidance(x: Latents, c_noise: Float[Array, " n"]) -> Latents:
        F_weak = weaker(x, c_noise).astype(jnp.float32)
        return F_weak + scale * (network(x, c_noise).astype(jnp.float32) - F_weak)

    return network_with_guidance


def adjusted(
    network: Network,
    x: Latents,
    sigma: Float[Array, " n"],
    average: Latents,
    strength: Strength,
    sigma_data: float,
) -> tuple[Latents, Latents]:
    """Guidance whose difference is averaged, bounded and projected, and whose result is rescaled.

    D_cond - D_uncond gets beta times its running average, is cut to the norm r, and is split into
    its parts parallel and orthogonal to D_cond, of which the parallel one is scaled by eta (APG,
    Sadat et al. 2024, arXiv 2410.02416, Algorithm 1). The result's deviation over each image is
    brought to that of D_cond, by a share phi (Lin et al. 2023, arXiv 2305.08891, equations 15, 16).

    Args:
      network: as `guided` takes it.
      average: running average of the difference, zero before the first evaluation.
    Returns:
      The guided D(x; sigma), and the average for the next evaluation.
    """
    c_skip, c_out, c_in, c_noise = diffusion.scalings(sigma, sigma_data)
    F_cond, F_uncond = _both(network, _per_image(c_in) * x, c_noise)
    D_cond = _per_image(c_skip) * x + _per_image(c_out) * F_cond
    average = _per_image(c_out) * (F_cond - F_uncond) + strength.momentum * average

    norm = jnp.sqrt(_sum(jnp.square(average)))  # (n, 1, 1, 1)
    bound = jnp.where(strength.norm > 0, strength.norm, jnp.inf)
    difference = average * jnp.minimum(1, bound / jnp.maximum(norm, 1e-12))
    along = _sum(difference * D_cond) / jnp.maximum(_sum(jnp.square(D_cond)), 1e-12)
    difference = difference + (strength.parallel - 1) * along * D_cond
    D = D_cond + (strength.scale - 1) * difference

    ratio = _deviation(D_cond) / jnp.maximum(_deviation(D), 1e-12)
    return D * (1 + strength.rescale * (ratio - 1)), average


def interleave(first: Float[Array, "n *s"], second: Float[Array, "n *s"]) -> Float[Array, "m *s"]:
    """Alternates rows: first[0], second[0], first[1], second[1], ..., (2n, ...)."""
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])


def _both(network: Network, x: Latents, c_noise: Float[Array, " n"]) -> tuple[Latents, Latents]:
    """Returns F with the caption and without, from one doubled batch."""
    F_both = network(interleave(x, x), interleave(c_noise, c_noise)).astype(jnp.float32)
    F_both = F_both.reshape(x.shape[0], 2, *x.shape[1:])  # (n, 2, height, width, channels)
    return F_both[:, 0], F_both[:, 1]


def _per_image(value: Float[Array, " n"]) -> Float[Array, "n 1 1 1"]:
    return value[:, None, None, None]


def _sum(x: Latents) -> Float[Array, "n 1 1 1"]:
    return jnp.sum(x, axis=(1, 2, 3), keepdims=True)


def _deviation(x: Latents) -> Float[Array, "n 1 1 1"]:
    return jnp.std(x, axis=(1, 2, 3), keepdims=True)
