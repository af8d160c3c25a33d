"""Networks, losses and schedules on trial beside the recipe's: `benchmarks.race` trains with them.

The package knows nothing of them. `Trial.installed` puts one in the place of the recipe's while a
run trains; what loses goes, what wins moves into the package.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from microdit_jax import train
from microdit_jax.diffusion import EdmConfig
from microdit_jax.models import dit, flops, masking
from microdit_jax.models.dit import Caption, DiT, DiTConfig
from microdit_jax.models.layers import (
    linear,
    sincos_pos_embed,
    timestep_embedding,
    unpatchify,
    zeros,
)
from microdit_jax.training import optim
from microdit_jax.training import step as train_step
from microdit_jax.training.loss import Batch, batch_loss

LEVEL_FEATURES = 32  # of a noise level, for the learned uncertainty
DECAY_SHARE = 0.2  # of the steps, in which the stable rate falls


# ------------------------------------------------------------------ value residual
class ValueResidual(DiT):
    """Mixes each block's attention values with those of the first block of the same width.

    "Value Residual Learning" (arXiv 2410.17897) has one width. Here widths grow with depth, so a
    block's values meet those of the first block of the mixer, or of the backbone, that has as many
    heads. The share is learned, from a half.
    """

    def setup(self):
        super().setup()
        count = len(self.patch_mixer) + len(self.blocks)
        self.value_mix = self.param("value_mix", nn.initializers.constant(0.5), (count,))

    def predict(self, *args, **kwargs):
        """F(x; t, caption), as DiT.predict."""
        firsts: dict[Any, Array] = {}
        number = iter(range(len(self.value_mix)))

        def mixed(call, args, kwargs, context):
            module = context.module
            if module.name != "qkv" or context.method_name != "__call__":
                return call(*args, **kwargs)
            q, k, own = call(*args, **kwargs)
            part = module.path[0].rpartition("_")[0]  # patch_mixer or blocks
            share = self.value_mix[next(number)].astype(own.dtype)
            first = firsts.setdefault((part, own.shape[-1]), own)
            return q, k, own + share * (first - own)

        with nn.intercept_methods(mixed):
            return super().predict(*args, **kwargs)


# ------------------------------------------------------------------ masking with all patches back
def mean_of_both(key, shape, dtype):
    """Initial weights (2 d, d) of the mean of two parts."""
    del key
    return jnp.concatenate([jnp.eye(shape[1], dtype=dtype)] * 2) / 2


class Rejoined(DiT):
    """The mask's tokens come back before the backbone's last block, and all patches have a loss.

    Attributes:
      fuses: a linear layer joins the mixer's tokens and the backbone's, as in SPRINT (arXiv
        2510.21986), also where nothing is masked; one learned token stands for those dropped. Else
        the mixer's tokens take their places: they were routed past the backbone's other blocks, as
        in TREAD (arXiv 2501.04765).
    """

    fuses: bool = False

    def setup(self):
        super().setup()
        if self.fuses:
            cfg = self.config
            self.fusion = linear(cfg.dim, cfg.precision, kernel_init=mean_of_both)
            self.mask_token = self.param("mask_token", zeros, (cfg.dim,))

    def predict(
        self,
        x: Float[Array, "n height width channels"],
        t: Float[Array, " n"],
        caption: Caption,
        *,
        mask_noise: Float[Array, "n t"] | None = None,
        mask_ratio: float = 0.0,
    ) -> tuple[Float[Array, "n height width channels"], None]:
        """F(x; t, caption) at all patches."""
        cfg = self.config
        keys_values = iter(caption.keys_values or ())
        x = self.x_embedder(jnp.asarray(x, cfg.dtype)).astype(jnp.float32)  # (n, t, d)
        x = x + sincos_pos_embed(cfg.dim, cfg.grid, cfg.pos_interp_scale)[None]
        c = self.t_embedder(t) + caption.pooled  # (n, d)
        if cfg.mixer_projects:
            x = self.patch_mixer_map_xin_1(self.patch_mixer_map_xin_0(x))
        x = x.astype(cfg.residual_dtype)
        for block in self.patch_mixer:
            x = block(x, caption.mixer_tokens, c, next(keys_values, None), caption.lengths)
        if cfg.mixer_projects:
            x = self.patch_mixer_map_xout_1(self.patch_mixer_map_xout_0(x))
        x = before = x.astype(cfg.residual_dtype)  # (n, t, d)
        mask = None
        if masking.num_kept(cfg.num_tokens, mask_ratio) < cfg.num_tokens:
            assert mask_noise is not None
            mask = masking.make_mask(mask_noise, mask_ratio)
            x = masking.drop_tokens(x, mask)  # (n, t_kept, d)
        for block in self.blocks[:-1]:
            x = block(x, caption.tokens, c, next(keys_values, None), caption.lengths)
        if mask is not None:
            stand_in = self.mask_token.astype(x.dtype)[None, None] if self.fuses else before
            dropped = mask.dropped[:, :, None].astype(x.dtype)  # (n, t, 1)
            x = masking.restore_tokens(x, mask) + dropped * stand_in  # (n, t, d)
        if self.fuses:
            x = self.fusion(jnp.concatenate([before, x], axis=-1)).astype(before.dtype)
        x = self.blocks[-1](x, caption.tokens, c, next(keys_values, None), caption.lengths)
        return unpatchify(self.final_layer(x, c), cfg.patch_size).astype(jnp.float32), None


class Fused(Rejoined):
    """SPRINT's masking."""

    fuses: bool = True


def rejoined_flops(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> int:
    """Operations of the forward pass of `Rejoined` on one image, those of a fusion left out."""
    t, d = cfg.num_tokens, cfg.dim
    kept, last = masking.num_kept(t, mask_ratio), cfg.backbone_blocks()[-1]
    total = flops.forward_flops(cfg, mask_ratio, caption_length)
    total += flops.block_flops(cfg, last, t, caption_length, d)
    total -= flops.block_flops(cfg, last, kept, caption_length, d)
    ends = cfg.patch_size**2 * cfg.in_channels + cfg.patch_mixer_dim * cfg.mixer_projects
    return total + 2 * (t - kept) * d * ends


def fused_flops(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> int:
    """Operations of the forward pass of `Fused` on one image."""
    fusion = 2 * cfg.num_tokens * 2 * cfg.dim * cfg.dim
    return rejoined_flops(cfg, mask_ratio, caption_length) + fusion


# ------------------------------------------------------------------ learned uncertainty
class Uncertain(DiT):
    """Beside F it learns u(sigma), the logarithm of the loss to be expected (EDM2, 2312.02696)."""

    def setup(self):
        super().setup()
        self.uncertainty = nn.Dense(1, kernel_init=zeros)

    def log_loss(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        """u at c_noise = ln(sigma) / 4."""
        return self.uncertainty(timestep_embedding(8 * t, LEVEL_FEATURES))[:, 0]

    def __call__(self, x, t, y, **kwargs):
        """F(x; t, y)."""
        if self.is_initializing():
            self.log_loss(t)
        return super().__call__(x, t, y, **kwargs)


def uncertain_loss(
    model: DiT, params: Any, batch: Batch, key: Any, *, edm: EdmConfig, mask_ratio: float
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Loss / exp(u) + u of each image of a training batch, and the loss itself of others."""
    loss, sigma = batch_loss(model, params, batch, key, edm=edm, mask_ratio=mask_ratio)
    if "keep_caption" not in batch:  # which training's batches have alone
        return loss, sigma
    u = model.apply({"params": params}, jnp.log(sigma) / 4, method="log_loss")
    return loss * jnp.exp(-u) + u, sigma


def uncertain_flops(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> int:
    """Operations of the forward pass of `Uncertain` on one image."""
    return flops.forward_flops(cfg, mask_ratio, caption_length) + 2 * LEVEL_FEATURES


# ------------------------------------------------------------------ schedule
def stable_then_linear(
    peak: float, *, warmup_steps: int = 0, decay_steps: int = 0, final_ratio: float = 1.0
) -> optax.Schedule:
    """Warm-up, the peak, and a straight line down in the last steps (WSD, arXiv 2404.06395)."""
    decay = max(1, round(DECAY_SHARE * decay_steps))
    up, down = (0.0, peak, max(1, warmup_steps)), (peak, final_ratio * peak, decay)
    parts = [optax.linear_schedule(*ends) for ends in (up, down)]
    joined = optax.join_schedules(parts, [decay_steps - decay])

    def rate(step):
        with optim.lenient_promotion():
            return joined(step)

    return rate


# ------------------------------------------------------------------ all
@dataclasses.dataclass(frozen=True)
class Trial:
    """Replacements of the recipe's network, loss and schedule.

    Attributes:
      forward_flops: of one image, as models.flops.forward_flops.
    """

    network: type[DiT] = DiT
    forward_flops: Callable[[DiTConfig, float, int], int] = flops.forward_flops
    loss: Callable[..., Any] = batch_loss
    schedule: Callable[..., optax.Schedule] = optim.learning_rate

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Trains with this inside the context."""
        places = (
            (train, "DiT", self.network),
            (dit, "DiT", self.network),
            (train_step, "batch_loss", self.loss),
            (optim, "learning_rate", self.schedule),
            # It would take a program that was kept for the recipe's network.
            (train, "SavedStep", lambda step, *_: step),
        )
        with contextlib.ExitStack() as stack:
            for place, name, value in places if self != Trial() else ():
                stack.enter_context(mock.patch.object(place, name, value))
            yield


TRIALS = {
    "": Trial(),
    "value_residual": Trial(ValueResidual),
    "fused": Trial(Fused, fused_flops),
    "routed": Trial(Rejoined, rejoined_flops),
    "uncertainty": Trial(Uncertain, uncertain_flops, uncertain_loss),
    "wsd": Trial(schedule=stable_then_linear),
}
