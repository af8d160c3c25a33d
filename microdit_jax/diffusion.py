"""EDM diffusion (Karras et al. 2022, arXiv 2206.00364) as MicroDiT uses it.

Everything here takes the network as a callable and knows nothing of how it is built. A *network* is
the raw F of the paper's equation 7, `F(x, c_noise)`; a *denoiser* is the D of the same equation,
`D(x, sigma)`. Latents are (n, height, width, channels) float32, in units in which sigma_data is the
standard deviation of the data; every computation here is float32 whatever the network's type.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

Latents = Float[Array, "n height width channels"]
Network = Callable[[Latents, Float[Array, " n"]], Latents]
MaskedNetwork = Callable[[Latents, Float[Array, " n"]], tuple[Latents, Float[Array, "n t"] | None]]
Denoiser = Callable[[Latents, Float[Array, " n"]], Latents]


@dataclasses.dataclass(frozen=True)
class EdmConfig:
    """Noise levels of training and sampling; the defaults are those of 256 px.

    Attributes:
      sigma_data: standard deviation of the data.
      P_mean, P_std: mean and deviation of ln(sigma) in training; 0 and 0.6 at 512 px.
      sigma_min, sigma_max, rho: of the sampler's levels (equation 5).
    """

    sigma_data: float = 0.9
    P_mean: float = -0.6
    P_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0


class Scalings(NamedTuple):
    """Preconditioning factors, each (n,) float32."""

    c_skip: Float[Array, " n"]
    c_out: Float[Array, " n"]
    c_in: Float[Array, " n"]
    c_noise: Float[Array, " n"]


def scalings(sigma: Float[Array, " n"], sigma_data: float) -> Scalings:
    """Preconditioning of the raw network F (EDM, Table 1, column "Ours").

    Args:
      sigma: noise level of each image, in units of the latent's standard deviation.
    Returns:
      c_skip, c_out, c_in, c_noise, each (n,) float32.
    """
    sigma = sigma.astype(jnp.float32)
    total = jnp.square(sigma) + sigma_data**2
    return Scalings(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / jnp.sqrt(total),
        c_in=1 / jnp.sqrt(total),
        c_noise=jnp.log(sigma) / 4,
    )


def _per_image(value: Float[Array, " n"]) -> Float[Array, "n 1 1 1"]:
    return value[:, None, None, None]


def denoiser(network: Network, sigma_data: float) -> Denoiser:
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM, equation 7)."""

    def denoise(x: Latents, sigma: Float[Array, " n"]) -> Latents:
        c_skip, c_out, c_in, c_noise = scalings(sigma, sigma_data)
        F_x = network(_per_image(c_in) * x, c_noise)
        return _per_image(c_skip) * x + _per_image(c_out) * F_x.astype(jnp.float32)

    return denoise


def training_sigma(normal: Float[Array, " n"], config: EdmConfig) -> Float[Array, " n"]:
    """Noise levels with ln(sigma) ~ N(P_mean, P_std^2), from standard normals (EDM, Table 1)."""
    return jnp.exp(normal.astype(jnp.float32) * config.P_std + config.P_mean)


def edm_loss(
    network: MaskedNetwork,
    latents: Latents,
    noise: Latents,
    sigma: Float[Array, " n"],
    *,
    sigma_data: float,
    patch_size: int,
) -> Float[Array, " n"]:
    """Weighted denoising error of each image (EDM, equations 7 and 8; masked: arXiv 2407.15811).

    Args:
      network: F(x, c_noise) -> (F_x, mask); the mask (n, t) is 1 at patches that F did not see, or
        None.
      latents: clean latents.
      noise: standard normal, of the latents' shape.
      sigma: noise level of each image.
    Returns:
      (n,) float32: mean over channels and over pixels, those of kept patches alone if masked.
    """
    latents, sigma = latents.astype(jnp.float32), sigma.astype(jnp.float32)
    x = latents + noise.astype(jnp.float32) * _per_image(sigma)
    # Equation 7: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
    c_skip, c_out, c_in, c_noise = scalings(sigma, sigma_data)
    F_x, mask = network(_per_image(c_in) * x, c_noise)
    D_x = _per_image(c_skip) * x + _per_image(c_out) * F_x.astype(jnp.float32)
    # Equation 8: the mean of lambda(sigma) |D_x - latents|^2
    weight = (jnp.square(sigma) + sigma_data**2) / jnp.square(sigma * sigma_data)  # lambda (n,)
    error = _per_image(weight) * jnp.square(D_x - latents)
    p = patch_size
    patches = reduce(error, "n (h p) (w q) c -> n (h w)", "mean", p=p, q=p)  # (n, t)
    if mask is None:
        return patches.mean(axis=1)
    kept = 1 - mask
    return (patches * kept).sum(axis=1) / kept.sum(axis=1)
