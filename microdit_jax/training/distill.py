"""The loss of few-step students: a guided teacher distilled into a consistency function.

A student's denoiser D(x; sigma) is to be the end of the teacher's trajectory through x instead of
the mean of all images that x may come from, so that one evaluation gives an image and a few give a
good one. The teacher integrates its trajectory in a few evaluations, and the student learns its end
from every point on it: a regression to solutions, as Luhman and Luhman (2021, arXiv 2101.02388)
have it from noise alone, at all the noise levels of a consistency model (Song et al. 2023, arXiv
2303.01469). docs/students.md compares it with continuous-time consistency.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from microdit_jax import diffusion
from microdit_jax.diffusion import Denoiser, EdmConfig, Latents, Network, scalings
from microdit_jax.models.dit import DiT
from microdit_jax.models.flops import TRAIN_OVER_FORWARD
from microdit_jax.sampling.schedules import dense_position
from microdit_jax.training.loss import Batch, sample_randomness

# Levels below which the scale of the dense levels is straight enough to interpolate; and how many
LOWEST, FINE = 1e-3, 512


class Trajectory(NamedTuple):
    """Points of the teacher's trajectories, from their starts on, and their ends.

    Attributes:
      x: (points, n, h, w, channels).
      sigma: noise levels of the points, (points, n).
      end: (n, h, w, channels), at sigma = 0.
    """

    x: Float[Array, "points n h w c"]
    sigma: Float[Array, "points n"]
    end: Latents


@dataclasses.dataclass(frozen=True)
class StudentLoss:
    """The loss by which a student learns from its teacher, called like `loss.batch_loss`.

    Attributes:
      edm: levels at which trajectories start, ln(sigma) ~ N(P_mean, P_std^2), up to sigma_max.
      guidance_scale: g of the teacher's classifier-free guidance, which the student has built in.
      guidance_interval: noise levels (low, high) outside which the teacher is not guided.
      trajectory_steps: evaluations of the teacher for a trajectory. The student learns from the
        first three quarters of its points; it is not sampled at levels as low as the others.
      from_noise: trajectories start from noise alone, at sigma_max, and no image is looked at.
    """

    edm: EdmConfig
    guidance_scale: float
    guidance_interval: tuple[float, float]
    trajectory_steps: int
    from_noise: bool = False

    def __call__(
        self, model: DiT, params: Any, teacher_params: Any, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Computes the distance from the ends of the teacher's trajectories.

        Args:
          batch: as `loss.batch_loss` takes it.
        Returns:
          Loss and the trajectory's first sigma of each image, each (n,) float32.
        """
        y = batch["caption_latents"].astype(jnp.float32)  # (n, l, caption)
        if "keep_caption" in batch:
            y = y * batch["keep_caption"][:, None, None]
        random = sample_randomness(key, batch["position"], model.config)
        sigma = diffusion.training_sigma(random.sigma_normal, self.edm)  # (n,)
        sigma = jnp.minimum(sigma, self.edm.sigma_max)
        latents = batch["latents"].astype(jnp.float32)
        if self.from_noise:
            sigma, latents = jnp.full_like(sigma, self.edm.sigma_max), 0 * latents
        start = latents + _per_image(sigma) * random.noise
        denoise = diffusion.denoiser(self._guided(model, teacher_params, y), self.edm.sigma_data)
        path = jax.lax.stop_gradient(trajectory(denoise, start, sigma, self.trajectory_steps))

        # (points, n, ...) -> (points n, ...)
        used = points_used(self.trajectory_steps)
        x = path.x[:used].reshape(-1, *start.shape[1:])
        c_skip, c_out, c_in, c_noise = scalings(path.sigma[:used].ravel(), self.edm.sigma_data)
        caption = model.apply({"params": params}, y, method="encode_caption")
        ends, captions = jax.tree.map(
            lambda rows: jnp.concatenate([rows] * used), (path.end, caption)
        )
        F = _predict(model, params, _per_image(c_in) * x, c_noise, captions)
        # |D - end|^2 with EDM's weight 1 / c_out^2: D = c_skip x + c_out F
        target = (ends - _per_image(c_skip) * x) / _per_image(c_out)
        losses = jnp.mean(jnp.square(F - target), axis=(1, 2, 3))
        return losses.reshape(used, -1).mean(axis=0), sigma

    def _guided(self, model: DiT, params: Any, y: Float[Array, "n l caption"]) -> Network:
        """Returns the guided teacher's F for these captions, which it encodes once."""
        low, high = self.guidance_interval
        both = jnp.concatenate([y, jnp.zeros_like(y)])
        captions = model.apply({"params": params}, both, method="encode_caption")

        def network(x: Latents, c_noise: Float[Array, " n"]) -> Latents:
            x, noise_twice = jnp.concatenate([x, x]), jnp.concatenate([c_noise, c_noise])
            F_cond, F_uncond = jnp.split(_predict(model, params, x, noise_twice, captions), 2)
            sigma = jnp.exp(4 * c_noise)
            scale = jnp.where((low < sigma) & (sigma <= high), self.guidance_scale, 1.0)
            return F_uncond + _per_image(scale) * (F_cond - F_uncond)

        return network


def trajectory(
    denoise: Denoiser, x: Latents, sigma: Float[Array, " n"], num_steps: int
) -> Trajectory:
    """Integrates dx/dsigma = (x - D(x; sigma)) / sigma to 0 from a noise level for each image.

    Second-order Adams-Bashforth, on levels spaced as `schedules.dense_levels` has them.

    Args:
      x: at noise levels sigma, (n, h, w, channels).
      num_steps: evaluations of the denoiser.
    """
    levels = trajectory_levels(sigma, num_steps)  # (num_steps + 1, n)

    def step(carry: tuple[Latents, Latents], at: tuple[Array, ...]) -> tuple[Any, Latents]:
        x, last = carry
        now, size, ratio = at
        slope = (x - denoise(x, now)) / _per_image(now)
        change = slope + _per_image(ratio) * (slope - last)
        return (x + _per_image(size) * change, slope), x

    sizes = jnp.diff(levels, axis=0)
    # Half a step over the one before; the first step is Euler's
    ratios = jnp.concatenate([0 * sizes[:1], sizes[1:] / sizes[:-1] / 2])
    (end, _), points = jax.lax.scan(step, (x, 0 * x), (levels[:-1], sizes, ratios))
    return Trajectory(points, levels[:-1], end)


def trajectory_levels(sigma: Float[Array, " n"], num_steps: int) -> Float[Array, "levels n"]:
    """Noise levels from each image's own down to 0, even on the scale of the dense levels."""
    fine = np.append(0.0, np.geomspace(LOWEST, 1e3, FINE))
    levels, positions = (values.astype(np.float32) for values in (fine, dense_position(fine)))
    position = jnp.interp(sigma, levels, positions)[None]  # (1, n)
    wanted = jnp.linspace(1.0, 0.0, num_steps + 1)[:, None] * position
    return jnp.interp(wanted, positions, levels).at[0].set(sigma)


def points_used(trajectory_steps: int) -> int:
    """Number of points of a trajectory that the student learns from."""
    return max(1, trajectory_steps * 3 // 4)


def over_forward(trajectory_steps: int) -> int:
    """Operations of a step over those of a forward pass: the guided teacher's, and the student's.

    It counts captions, which are encoded once, as often as the passes.
    """
    return 2 * trajectory_steps + TRAIN_OVER_FORWARD * points_used(trajectory_steps)


def _predict(
    model: DiT, params: Any, x: Latents, c_noise: Float[Array, " n"], caption: Any
) -> Latents:
    F: Any = model.apply({"params": params}, x, c_noise, caption, method="predict")
    return F[0].astype(jnp.float32)


def _per_image(value: Float[Array, " n"]) -> Float[Array, "n 1 1 1"]:
    return value[:, None, None, None]
