"""Turns a run configuration into network, optimiser and step, and checks it before anything starts.

`training.data` opens the data that it names, `training.rules` says what each value may be.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from microdit_jax import sharding
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.evaluate.prompts import RUN_SPLITS, read_prompts
from microdit_jax.machine import compile_options
from microdit_jax.models import ARCHES, flops, masking, moe
from microdit_jax.models.dit import DiT, DiTConfig, abstract_params
from microdit_jax.training import distill, optim, rules
from microdit_jax.training import step as train_step
from microdit_jax.training.caption_tower import CaptionTower
from microdit_jax.training.evaluation import EVALUATORS
from microdit_jax.training.metric_writer import import_wandb
from microdit_jax.training.source import adapters, lora_loss
from microdit_jax.training.step import Metrics, TrainState
from microdit_jax.training.teacher import student_loss


def model_config(config: ConfigDict) -> DiTConfig:
    """Returns the network that a run configuration describes.

    Raises:
      UserError: an unknown arch or option, or sizes that do not go together.
    """
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
    try:
        return arches[arch](**options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # sizes of another type than a number
        raise UserError(f"model.options cannot be used: {error}; found {options}") from error


def make_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimiser of a run configuration, and its learning rate by step."""
    part = config.optim
    schedule = optim.learning_rate(
        part.learning_rate,
        warmup_steps=part.warmup_steps,
        decay_steps=part.decay_steps,
        final_ratio=part.final_ratio,
        linear_steps=part.linear_steps,
    )
    optimizer = optim.adamw(
        schedule,
        weight_decay=part.weight_decay,
        clip_norm=part.clip_norm,
        expert_multiplier=part.expert_multiplier,
        muon_dtype=config.model.options.dtype if part.name == "muon" else None,
    )
    return optimizer, schedule


def num_micro_batches(config: ConfigDict, mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of micro-batches in which each device computes its share of a batch.

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
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted training step of a run configuration; it donates its state.

    Of a config with a teacher or adapters, it takes the frozen weights as its third argument.

    Compiled with the XLA options of `machine.compile_options` for the mesh's platform. With a
    tower, its batches hold "tokens" (n, l), which become embeddings in the same program.
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
        gradient_dtype=config.train.gradient_dtype,
        module_grad_norms=config.train.module_grad_norms,
        frozen_loss=student_loss(config) or lora_loss(config),
    )
    options = compile_options.step_options(mesh) if isinstance(mesh, Mesh) else {}
    if tower is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options)

    def embed_and_step(state, batch, tower_params, *teacher_params):
        return step(state, tower.embed(tower_params, batch), *teacher_params)

    jitted = jax.jit(embed_and_step, donate_argnums=0, compiler_options=options)
    return lambda state, batch, *teacher: jitted(state, batch, tower.params, *teacher)


# ------------------------------------------------------------------ checks
def check(config: ConfigDict, mesh: Mesh | AbstractMesh | None = None) -> None:
    """Checks a run configuration, one stage or a chain of them, without opening any data.

    Args:
      mesh: of a single stage; None makes the mesh that each stage's own configuration asks for.
    Raises:
      UserError: a value that some stage could not run with, days later as well as now.
    """
    if "stages" not in config:
        return _check_stage(config, mesh)
    if not config.stages:
        raise UserError("config.stages must name one stage or more, found none")
    for position, name in enumerate(config.stages):
        if name not in config or not isinstance(config[name], ConfigDict):
            raise UserError(f"config.stages names {name}, found no such stage in the config")
        if name in config.stages[:position]:
            raise UserError(f"config.stages must name a stage once, found {name} twice")
        try:
            _check_stage(config[name], None)
            _check_predecessor(config, position)
        except UserError as error:
            raise UserError(f"stage {name}: {error}") from error


def _check_stage(config: ConfigDict, mesh: Mesh | AbstractMesh | None) -> None:
    rules.check_keys(config)
    rules.check_ranges(config)
    rules.check_datasets(config.data)
    rules.check_prompts(config.eval)
    mesh = sharding.make_mesh(**config.mesh) if mesh is None else mesh
    num_micro_batches(config, mesh)
    cfg = model_config(config)
    kept = masking.num_kept(cfg.num_tokens, config.train.mask_ratio)
    moe.check_slots(cfg.expert_capacity, kept, cfg.num_experts)
    experts = any(block.is_moe for block in (*cfg.mixer_blocks(), *cfg.backbone_blocks()))
    if experts and cfg.num_experts % mesh.shape["expert"]:
        raise UserError(
            f"mesh.expert must divide the {cfg.num_experts} experts, found {mesh.shape['expert']}"
        )
    make_optimizer(config)
    _check_distillation(config)
    _check_adapters(config, cfg)
    if config.loss.learned_uncertainty and (config.teacher or config.lora.rank):
        raise UserError(
            "loss.learned_uncertainty is for training all weights by the EDM loss, found a teacher "
            "or lora.rank beside it; leave it False"
        )
    if config.init_from and config.init_weights_from:
        raise UserError(
            "give one of config.init_from and config.init_weights_from, found "
            f"{config.init_from} and {config.init_weights_from}"
        )
    if unknown := [name for name in config.eval.evaluators if name not in EVALUATORS]:
        raise UserError(
            f"eval.evaluators takes {', '.join(EVALUATORS)}, found {', '.join(map(str, unknown))}"
        )
    if config.eval.score_images:
        read_prompts(config.eval.score_prompts, config.eval.score_images)
        reference = config.eval.score_reference
        if "://" not in reference and reference not in RUN_SPLITS and not Path(reference).exists():
            raise UserError(
                "eval.score_reference must be train, heldout, .npz of statistics or a folder of "
                f"images, found nothing at {reference!r}"
            )
    if config.log.wandb:
        import_wandb()


def over_forward(config: ConfigDict) -> int:
    """Operations of a training step on an image, over those of one forward pass."""
    if config.teacher:
        return distill.over_forward(config.distill.trajectory_steps)
    return flops.TRAIN_OVER_FORWARD


def _check_distillation(config: ConfigDict) -> None:
    """Raises UserError for what a student cannot learn with."""
    if not config.teacher:
        return
    if config.train.mask_ratio:
        raise UserError(
            f"train.mask_ratio must be 0 with a teacher, found {config.train.mask_ratio}"
        )
    if config.init_from or config.init_weights_from:
        raise UserError(
            "a student starts as its teacher, found config.init_from or init_weights_from too; "
            "leave them empty"
        )
    interval = tuple(config.distill.guidance_interval)
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise UserError(
            f"distill.guidance_interval must be two noise levels 0 <= low < high, found {interval}"
        )
    if "heldout_loss" in config.eval.evaluators:
        raise UserError(
            "eval.evaluators must not have heldout_loss with a teacher: a student's denoised image "
            "is none of the means that it measures; take sample_scores"
        )


def _check_adapters(config: ConfigDict, cfg: DiTConfig) -> None:
    """Raises UserError for adapters that cannot be trained."""
    lora = adapters(config)
    if lora is None:
        return
    if not config.init_weights_from or config.init_from or config.teacher:
        raise UserError(
            "lora.rank asks for adapters of the weights that config.init_weights_from names, found "
            "none, or an init_from or a teacher beside it; give that alone"
        )
    lora.paths(abstract_params(cfg))


def _check_predecessor(config: ConfigDict, position: int) -> None:
    """Checks a stage of a chain against the stage whose weights or state it starts from."""
    name, earlier = config.stages[position], config.stages[:position]
    stage = config[name]
    for key in ("init_from", "init_weights_from"):
        source = chained(stage[key], name)
        if source is None or source not in config.stages:
            continue
        if source not in earlier:
            raise UserError(f"config.{key} must be an earlier stage, found {source}")
        before = config[source]
        if key == "init_from" and before.train.steps >= stage.train.steps:
            raise UserError(
                f"train.steps counts from the start of {source}, which ends at step "
                f"{before.train.steps}, found {stage.train.steps}; raise it"
            )
        shapes = [dataclasses.asdict(model_config(part)) for part in (before, stage)]
        differing = [field for field in WEIGHT_FIELDS if shapes[0][field] != shapes[1][field]]
        if differing:
            raise UserError(
                f"the network must have the weights of stage {source}, found another "
                f"{', '.join(differing)}"
            )


# Fields of DiTConfig that decide which weights there are, and of which shapes
WEIGHT_FIELDS = (
    "patch_size", "in_channels", "dim", "depth", "head_dim", "multiple_of", "caption_channels",
    "qkv_multipliers", "ffn_multipliers", "use_patch_mixer", "patch_mixer_depth",
    "patch_mixer_dim", "patch_mixer_qkv_ratio", "patch_mixer_mlp_ratio", "use_bias",
    "num_experts", "experts_every_n", "param_dtype",
)  # fmt: skip


def chained(source: str, stage: str) -> str | None:
    """Returns the stage's name that a path such as "{workdir}/../NAME" means, None for no such."""
    path = os.path.normpath(source.replace("{workdir}", f"/chain/{stage}"))
    parent, name = os.path.split(path)
    return name if "{workdir}" in source and parent == "/chain" else None


def missing_folders(config: ConfigDict) -> list[str]:
    """Returns the local folders of latents that a stage will read and that are not there yet."""
    entries = (*config.data.datasets, config.data.heldout)
    folders = [entry["folder"] for entry in entries if entry["source"] == "latents"]
    folders += [config.data.folder] if config.data.folder else []
    return [f for f in dict.fromkeys(folders) if "://" not in f and not Path(f).is_dir()]
