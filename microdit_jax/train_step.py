"""TrainState and the pure functions that move it, for training, compilation and benchmarks."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from microdit_jax import diffusion, optim
from microdit_jax.diffusion import EdmConfig
from microdit_jax.models import masking
from microdit_jax.models.dit import DiT

Batch = dict[str, Array]
Metrics = dict[str, Array]


class TrainState(flax.struct.PyTreeNode):
    """All that training carries from step to step.

    step: updates done, int32 (). params, ema: float32 trees; ema is None where none is kept.
    Trees of shapes, shardings and names take the same form, hence Any.
    """

    step: Any
    params: Any
    opt_state: optax.OptState
    ema: Any | None


def init_state(
    model: DiT, optimizer: optax.GradientTransformation, key: Array, *, with_ema: bool
) -> TrainState:
    """The state before the first step. Pure: jit it, or take its shapes with `jax.eval_shape`."""
    cfg = model.config
    x = jnp.zeros((1, cfg.input_size, cfg.input_size, cfg.in_channels), jnp.float32)
    y = jnp.zeros((1, 1, cfg.caption_channels), jnp.float32)
    params = model.init(key, x, jnp.zeros(1, jnp.float32), y)["params"]
    # A copy, so that donating the state never donates one buffer twice.
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def batch_loss(
    model: DiT, params: Any, batch: Batch, key: Array, *, edm: EdmConfig, mask_ratio: float
) -> Float[Array, " n"]:
    """EDM loss of each image of a batch, with all randomness from one key.

    Args:
      batch: "latents" (n, height, width, channels), "caption_latents" (n, l, caption), and
        optionally "keep_caption" (n,), 0 where the caption is dropped (set to zero).
      mask_ratio: share of patches dropped after the mixer; static.
    """
    latents, y = batch["latents"], batch["caption_latents"].astype(jnp.float32)
    if "keep_caption" in batch:
        y = y * batch["keep_caption"][:, None, None]
    n = latents.shape[0]
    sigma_key, noise_key, mask_key = jax.random.split(key, 3)
    sigma = diffusion.training_sigma(jax.random.normal(sigma_key, (n,), jnp.float32), edm)
    noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
    mask_noise = masking.draw_noise(mask_key, n, model.config.num_tokens)

    def network(x, c_noise):
        return model.apply(
            {"params": params}, x, c_noise, y, mask_noise=mask_noise, mask_ratio=mask_ratio
        )

    return diffusion.edm_loss(
        network,
        latents,
        noise,
        sigma,
        sigma_data=edm.sigma_data,
        patch_size=model.config.patch_size,
    )


def make_train_step(
    model: DiT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    edm: EdmConfig,
    mask_ratio: float,
    seed: int,
    ema_smoothing: float,
    ema_start_step: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One update, as a pure function of state and batch; its randomness is f(seed, step)."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def mean_loss(params):
            losses = batch_loss(model, params, batch, key, edm=edm, mask_ratio=mask_ratio)
            return losses.mean()

        loss, grads = jax.value_and_grad(mean_loss)(state.params)
        params, opt_state = optim.apply_gradients(optimizer, grads, state.opt_state, state.params)
        step = state.step + 1
        ema = state.ema
        if ema is not None:
            ema = optim.update_ema(
                ema, params, step, smoothing=ema_smoothing, start_step=ema_start_step
            )
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(step, params, opt_state, ema), metrics

    return train_step


def make_eval_step(
    model: DiT, *, edm: EdmConfig, seed: int
) -> Callable[[Any, Batch], Float[Array, " n"]]:
    """Unmasked loss of each image; its noise is a function of seed and the batch's "draw"."""

    def eval_step(params: Any, batch: Batch) -> Float[Array, " n"]:
        key = jax.random.fold_in(jax.random.key(seed), batch["draw"])
        return batch_loss(model, params, batch, key, edm=edm, mask_ratio=0.0)

    return eval_step
