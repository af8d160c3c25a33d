"""Counts the operations of a race's training steps, by models/flops.py and as compiled."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.race_runs import CANDIDATES, Entrant, Settings, operations, run_configs
from microdit_jax.diffusion import EdmConfig
from microdit_jax.encoders.registry import text_encoder
from microdit_jax.models.dit import DiT
from microdit_jax.training import step as train_step
from microdit_jax.training.config import make_optimizer, model_config
from microdit_jax.xla.hlo import count


def compiled_flops(config: ConfigDict) -> float:
    """Operations of all matmuls of one training step on one device, from its optimised HLO."""
    cfg, n = model_config(config), config.train.batch_size
    model, (optimizer, schedule) = DiT(cfg), make_optimizer(config)
    step = train_step.make_train_step(
        model,
        optimizer,
        schedule,
        edm=EdmConfig(**config.edm),
        mask_ratio=config.train.mask_ratio,
        seed=config.seed,
        ema_smoothing=config.ema.smoothing,
        ema_start_step=config.ema.start_step,
    )
    state: Any = jax.eval_shape(
        lambda key: train_step.init_state(model, optimizer, key, with_ema=False), jax.random.key(0)
    )
    image = (cfg.input_size, cfg.input_size, cfg.in_channels)
    caption = (text_encoder(config.data.text_encoder).max_tokens, cfg.caption_channels)
    shapes = {"latents": image, "caption_latents": caption, "keep_caption": ()}
    batch = {k: jax.ShapeDtypeStruct((n, *s), jnp.float32) for k, s in shapes.items()}
    compiled = jax.jit(step).lower(state, batch).compile()
    return count.count(compiled.as_text() or "").flops


def table(names: Sequence[str], base: ConfigDict, images: int = 4) -> str:
    """Returns the operations of a step in each candidate's first stage, as Markdown.

    Args:
      images: of a batch.
    """
    base = base.copy_and_resolve_references()
    base.train.batch_size = images
    rows = [["candidate", "network", "optimiser", "compiled", "compiled over both"], ["---"] * 5]
    for name in names:
        entrant = Entrant(name, 1e-3, 0, (2,) * len(CANDIDATES[name].stages))
        config = run_configs(entrant, base, Settings("data"))[0]
        network, own = operations(config)
        found = compiled_flops(config)
        figures = (f"{x / 1e6:.2f} MFLOP" for x in (network, own, found))
        rows.append([name, *figures, f"{found / (network + own):.4f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
