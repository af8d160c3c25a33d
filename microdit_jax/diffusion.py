"""EDM diffusion (Karras et al. 2022, arXiv 2206.00364) as MicroDiT uses it.

Everything here takes the network as a callable and knows nothing of how it is built. A *network* is
the raw F of the paper's equation 7, `F(x, c_noise)`; a *denoiser* is the D of the same equation,
`D(x, sigma)`. Latents are (n, height, width, channels) float32, in units in which sigma_data is the
standard deviation of the data; every computation here is float32 whatever the network's type.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Float, Float64

from microdit_jax.errors import UserError

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


def sigma_steps(num_steps: int, config: EdmConfig = EdmConfig()) -> Float64[np.ndarray, " steps"]:
    """Noise levels of a sampling run, from sigma_max to sigma_min, then 0 (EDM, equation 5).

    Returns:
      (num_steps + 1,) float64.
    Raises:
      UserError: fewer than one step.
    """
    if num_steps < 1:
        raise UserError(f"num_inference_steps must be at least 1, found {num_steps}")
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    ramp = np.arange(num_steps, dtype=np.float64) / max(num_steps - 1, 1)
    return np.append((high + ramp * (low - high)) ** config.rho, 0.0)


class HeunState(NamedTuple):
    """The sampler's state between two network evaluations, all float32.

    Attributes:
      x: input of the next evaluation.
      x_start: x at the start of the step.
      slope_start: dx/dsigma at the start of the step.
    """

    x: Latents
    x_start: Latents
    slope_start: Latents


def heun_start(noise: Latents, config: EdmConfig = EdmConfig()) -> HeunState:
    """The state before the first evaluation: standard normal noise times sigma_max."""
    x = noise.astype(jnp.float32) * np.float32(config.sigma_max)
    # Three buffers, since the state is donated from evaluation to evaluation. Zeros made from x are
    # sharded like x.
    return HeunState(x, jnp.copy(x), 0 * x)


def heun_evaluations(num_steps: int, config: EdmConfig = EdmConfig()) -> dict[str, np.ndarray]:
    """Tabulates the input `at` of `heun_evaluate` for each of the 2 num_steps - 1 evaluations.

    Row 2i evaluates D at sigma_i (a prediction, Euler), row 2i + 1 at sigma_{i+1} (its correction,
    Heun); both then step from x_i by `step`. The last step, to sigma 0, is Euler's alone.

    Returns:
      "sigma" float32, "step" float32 and "corrects" bool, each (2 num_steps - 1,).
    """
    sigma = sigma_steps(num_steps, config)
    current, following = sigma[:-1], sigma[1:]
    return {
        "sigma": np.stack([current, following], axis=1).reshape(-1)[:-1].astype(np.float32),
        "step": np.repeat(following - current, 2)[:-1].astype(np.float32),
        "corrects": (np.arange(2 * num_steps - 1) % 2).astype(bool),
    }


def heun_evaluate(
    denoise: Denoiser, state: HeunState, at: Mapping[str, Array | np.ndarray]
) -> HeunState:
    """Evaluates the network once and updates the state (EDM, Algorithm 1, no churn).

    Args:
      denoise: D(x, sigma) with sigma (n,).
      at: one row of `heun_evaluations`; its values may be traced, so that one compiled program
        serves every evaluation and any number of steps.
    """
    x, x_start, slope_start = state
    slope = (x - denoise(x, jnp.broadcast_to(at["sigma"], x.shape[:1]))) / at["sigma"]
    mean_slope = jnp.where(at["corrects"], 0.5 * (slope_start + slope), slope)
    x_next = x_start + at["step"] * mean_slope
    # A prediction keeps its starting point for the correction that follows.
    return HeunState(x_next, jnp.where(at["corrects"], x_next, x_start), slope)


def heun_denoised(state: HeunState, sigma: Float[Array, ""]) -> Latents:
    """Recovers D(x; sigma) of a prediction, for a preview: x - sigma dx/dsigma.

    Args:
      state: result of a `heun_evaluate` that does not correct.
      sigma: the noise level of that evaluation.
    """
    return state.x_start - sigma * state.slope_start


def heun_sampler(
    denoise: Denoiser, noise: Latents, num_steps: int, config: EdmConfig = EdmConfig()
) -> Latents:
    """Runs the deterministic second-order sampler (EDM, Algorithm 1, no churn) as one loop.

    The reference keeps the trajectory in float64 and rounds to float32 at every network call. Here
    the noise levels are computed in float64 and the state is float32. Each update rounds x by about
    1e-7 of its size, no more than the reference's rounding does, and no two terms cancel, since
    sigma only falls. The result stays within 1e-5 of the reference's 30-step float64 trajectory
    (tests/test_diffusion.py) without 64-bit mode, which TPUs lack.

    Args:
      denoise: D(x, sigma) with sigma (n,).
      noise: standard normal, (n, height, width, channels).
      num_steps: steps of the schedule; static.
    Returns:
      Denoised latents, float32.
    """
    # The loop runs over evaluations, not steps, so that the network is traced once.
    state, _ = jax.lax.scan(
        lambda state, at: (heun_evaluate(denoise, state, at), None),
        heun_start(noise, config),
        heun_evaluations(num_steps, config),
    )
    return state.x
