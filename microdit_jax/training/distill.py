"""The loss of few-step students: a guided teacher distilled into a consistency function.

A student's denoiser D(x; sigma) is to be the end of the teacher's trajectory through x instead of
the mean of all images that x may come from, so that one evaluation gives an image and a few give a
good one. Continuous-time consistency distillation as sCM does it (Lu and Song 2024, arXiv
2410.11081, Algorithm 1), in EDM's variables. The paper's TrigFlow has sigma = sigma_data tan t, its
network is -F, and its inputs are those of equation 7 of EDM, so student and teacher are the same
kind of network, and a student begins as its teacher.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from microdit_jax import diffusion
from microdit_jax.diffusion import EdmConfig, Latents, Network
from microdit_jax.models import derivatives
from microdit_jax.models.dit import DiT
from microdit_jax.sampling import solvers
from microdit_jax.sampling.schedules import dense_levels
from microdit_jax.training.loss import Batch, sample_randomness

TRAJECTORY = 1  # folded into a step's key for the noise of teachers' images
TANGENT_OFFSET = 0.1  # c of sCM's tangent normalisation, g / (|g| + c)


@dataclasses.dataclass(frozen=True)
class StudentLoss:
    """The loss by which a student learns from its teacher, called like `loss.batch_loss`.

    Attributes:
      teacher: the teacher's network, which is also the student's for its derivative: `jax.jvp`
        passes it, as its attention is no kernel with a backward pass of its own.
      edm: noise levels, ln(sigma) ~ N(P_mean, P_std^2).
      guidance_scale: g of the teacher's classifier-free guidance, which the student has built in.
      guidance_interval: noise levels (low, high) outside which the teacher is not guided.
      warmup_steps: steps over which the derivative along the trajectory comes in. Before it does,
        the student learns the guided teacher's own F.
      trajectory_steps: evaluations of the teacher that make an image from noise for each caption;
        0: the batch has the images.
    """

    teacher: DiT
    edm: EdmConfig
    guidance_scale: float
    guidance_interval: tuple[float, float]
    warmup_steps: int
    trajectory_steps: int = 0

    def __call__(
        self,
        model: DiT,
        params: Any,
        teacher_params: Any,
        batch: Batch,
        key: PRNGKeyArray,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Consistency loss of each image of a batch, and its noise level.

        Args:
          batch: as `loss.batch_loss` takes it.
          step: steps done, for the warm-up.
        Returns:
          Loss and sigma, each (n,) float32.
        """
        y = batch["caption_latents"].astype(jnp.float32)  # (n, l, caption)
        if "keep_caption" in batch:
            y = y * batch["keep_caption"][:, None, None]
        random = sample_randomness(key, batch["position"], model.config)
        sigma = diffusion.training_sigma(random.sigma_normal, self.edm)  # (n,)
        guided = self._guided(teacher_params, y)
        if self.trajectory_steps:
            # Noise of its own: an image made from the noise that is added to it would be special.
            other = sample_randomness(
                jax.random.fold_in(key, TRAJECTORY), batch["position"], model.config
            )
            latents = jax.lax.stop_gradient(self._sampled(guided, other.noise))
        else:
            latents = batch["latents"].astype(jnp.float32)

        # x_t / sigma_data = cos(t) x_0 / sigma_data + sin(t) z, which is c_in (x_0 + sigma z)
        t = jnp.arctan(sigma / self.edm.sigma_data)
        cos, sin = _per_image(jnp.cos(t)), _per_image(jnp.sin(t))
        x = cos * latents / self.edm.sigma_data + sin * random.noise
        c_noise = jnp.log(sigma) / 4
        F_teacher = jax.lax.stop_gradient(guided(x, c_noise))

        frozen = jax.lax.stop_gradient(params)
        with derivatives.forward_mode():
            # cos sin dF/dt along dx_t/dt = -sigma_data F_teacher, with c_noise = ln(sigma) / 4
            F, derivative = jax.jvp(
                lambda x, c_noise: _apply(self.teacher, frozen, x, c_noise, y),
                (x, c_noise),
                (-cos * sin * F_teacher, jnp.full_like(c_noise, 0.25)),
            )
        # -cos(t) / sigma_data df/dt of f = cos(t) x_t + sin(t) sigma_data F: sCM's tangent g, whose
        # part with the derivative comes in by a ratio r
        ratio = jnp.minimum(1.0, step.astype(jnp.float32) / max(self.warmup_steps, 1))
        tangent = jnp.square(cos) * (F_teacher - F) + ratio * (cos * sin * x - derivative)
        size = jnp.sqrt(jnp.mean(jnp.square(tangent), axis=(1, 2, 3), keepdims=True))
        target = jax.lax.stop_gradient(F + tangent / (size + TANGENT_OFFSET))
        F_student = _apply(model, params, x, c_noise, y)
        return jnp.mean(jnp.square(F_student - target), axis=(1, 2, 3)), sigma

    def _guided(self, params: Any, y: Float[Array, "n l caption"]) -> Network:
        """Returns the guided teacher's F for these captions."""
        low, high = self.guidance_interval

        def network(x: Latents, c_noise: Float[Array, " n"]) -> Latents:
            F_cond = _apply(self.teacher, params, x, c_noise, y)
            F_uncond = _apply(self.teacher, params, x, c_noise, jnp.zeros_like(y))
            sigma = jnp.exp(4 * c_noise)
            scale = jnp.where((low < sigma) & (sigma <= high), self.guidance_scale, 1.0)
            return F_uncond + _per_image(scale) * (F_cond - F_uncond)

        return network

    def _sampled(self, guided: Network, noise: Latents) -> Latents:
        """Samples latents of the guided teacher, with few evaluations."""
        levels = dense_levels(self.trajectory_steps, self.edm)
        rows = solvers.stabilised_adams_bashforth(levels)
        denoise = diffusion.denoiser(guided, self.edm.sigma_data)
        return solvers.sample(denoise, noise, rows, self.edm)


def _apply(
    network: DiT, params: Any, x: Latents, c_noise: Float[Array, " n"], y: Float[Array, "n l c"]
) -> Latents:
    F: Any = network.apply({"params": params}, x, c_noise, y)
    return F[0].astype(jnp.float32)


def _per_image(value: Float[Array, " n"]) -> Float[Array, "n 1 1 1"]:
    return value[:, None, None, None]
