"""What a run configuration stands for: the network, the optimiser, the step; run_data, the data."""

import dataclasses
from collections.abc import Callable

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.machine import compile_options
from microdit_jax.models import ARCHES
from microdit_jax.models.dit import DiT, DiTConfig
from microdit_jax.training import optim
from microdit_jax.training import step as train_step
from microdit_jax.training.caption_tower import CaptionTower
from microdit_jax.training.loss import Batch
from microdit_jax.training.step import Metrics, TrainState


def model_config(config: ConfigDict) -> DiTConfig:
    """The network of a run configuration."""
    arches = ARCHES | {"DiT": DiTConfig}  # "DiT": every size by hand
    arch, options = config.model.arch, config.model.options.to_dict()
    if arch not in arches:
        raise UserError(f"model.arch must be one of {', '.join(arches)}, found {arch!r}")
    known = {field.name for field in dataclasses.fields(DiTConfig)}
    if unknown := sorted(set(options) - known):
        raise UserError(
            f"model.options takes fields of DiTConfig, found {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    return arches[arch](**options)


def make_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of a run configuration, and its learning rate by step."""
    part = config.optim
    schedule = optim.learning_rate(
        part.learning_rate,
        warmup_steps=part.warmup_steps,
        decay_steps=part.decay_steps,
        final_ratio=part.final_ratio,
    )
    optimizer = optim.adamw(
        schedule,
        weight_decay=part.weight_decay,
        clip_norm=part.clip_norm,
        expert_multiplier=part.expert_multiplier,
    )
    return optimizer, schedule


def num_micro_batches(config: ConfigDict, mesh: Mesh | AbstractMesh) -> int:
    """In how many parts each device computes its share of a batch.

    Raises:
      UserError: the batch does not divide by the devices, or the share by the parts.
    """
    size, wanted = config.train.batch_size, config.train.micro_batch_size
    if size % mesh.size:
        raise UserError(
            f"train.batch_size must be a multiple of the {mesh.size} devices, found {size}"
        )
    share = size // mesh.size
    if not 0 < wanted < share:
        return 1
    if share % wanted:
        raise UserError(
            f"train.micro_batch_size must divide the {share} images of each device, found {wanted}"
        )
    return share // wanted


def make_step(
    config: ConfigDict,
    model: DiT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh | AbstractMesh,
    tower: CaptionTower | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The training step of a run configuration, jitted, its state donated, by our presets of XLA.

    With a tower, its batches hold "tokens" (n, l), which become embeddings in the same program.
    """
    step = train_step.make_train_step(
        model,
        optimizer,
        schedule,
        edm=EdmConfig(**config.edm),
        mask_ratio=config.train.mask_ratio,
        seed=config.seed,
        ema_smoothing=config.ema.smoothing,
        ema_start_step=config.ema.start_step,
        mesh=mesh,
        micro_batches=num_micro_batches(config, mesh),
        module_grad_norms=config.train.module_grad_norms,
    )
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else ""
    options = compile_options.compiler_options(platform)
    if tower is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options)

    def embed_and_step(state, batch, tower_params):
        return step(state, tower.embed(tower_params, batch))

    jitted = jax.jit(embed_and_step, donate_argnums=0, compiler_options=options)
    return lambda state, batch: jitted(state, batch, tower.params)


# Counts of a run configuration by the least that they may be.
COUNTS = {
    1: (
        "train.steps", "train.batch_size", "train.log_every", "train.eval_every",
        "train.checkpoint_every", "eval.num_images", "eval.batch_size", "eval.draws",
        "eval.num_inference_steps", "profile.start",
    ),
    0: (
        "train.micro_batch_size", "train.max_skipped", "eval.num_samples", "eval.score_images",
        "data.threads", "profile.steps",
    ),
}  # fmt: skip


def check_counts(config: ConfigDict) -> None:
    """Raises UserError for a count below its least: some are needed only hours after the start."""
    for least, names in COUNTS.items():
        for name in names:
            part, key = name.split(".")
            if config[part][key] < least:
                raise UserError(f"{name} must be at least {least}, found {config[part][key]}")
