"""Training: one stage read top to bottom, and several in a row."""

import contextlib
import dataclasses
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from microdit_jax import sharding
from microdit_jax.checkpoints import run as run_checkpoint
from microdit_jax.checkpoints.run import RunCheckpoints
from microdit_jax.data.prefetch import Prefetch
from microdit_jax.diffusion import EdmConfig
from microdit_jax.files import disk_errors
from microdit_jax.machine import hosts, memory
from microdit_jax.machine.chips import chip_of
from microdit_jax.machine.signals import StopRequest
from microdit_jax.models import flops, masking, moe
from microdit_jax.models.dit import DiT, for_this_machine
from microdit_jax.training import report
from microdit_jax.training.config import (
    check_counts,
    make_optimizer,
    make_step,
    model_config,
    num_micro_batches,
)
from microdit_jax.training.data import RunData, check_data, load_data
from microdit_jax.training.evaluation import Evaluation
from microdit_jax.training.metric_writer import MetricWriter, import_wandb
from microdit_jax.training.progress import Progress, StepTrace
from microdit_jax.training.start import starting_state
from microdit_jax.training.step import TrainState

OUT_OF_MEMORY = (
    "a smaller train.micro_batch_size, model.options.remat=block, or more devices over mesh.fsdp"
)


def train(config: ConfigDict, workdir: str | Path, stop: StopRequest | None = None) -> TrainState:
    """Trains one stage; the same call again resumes, and returns at once when all is done.

    All processes call it. On SIGTERM or SIGINT it saves and returns early.

    Leaves in the workdir: config.json, checkpoints/, metrics.jsonl (a line each `log_every` steps
    and each evaluation), tensorboard/, samples/, nonfinite/ where updates were skipped, profile/
    where asked for, and vae/ where the data made their codec.

    Args:
      stop: of a chain of stages, so that no signal is lost between two of them.
    Returns:
      The last state; its step is below config.train.steps after a signal.
    Raises:
      UserError: a config that cannot be run, data or checkpoints that do not fit it, too many
        updates in a row that are not finite.
    """
    workdir, run = Path(workdir), config.train
    first_process = jax.process_index() == 0
    # ---------------------------------------------------------------- mesh, network, data
    mesh = sharding.make_mesh(**config.mesh)
    num_micro_batches(config, mesh)  # raises here what does not divide
    cfg, edm = model_config(config), EdmConfig(**config.edm)
    kept = masking.num_kept(cfg.num_tokens, run.mask_ratio)
    moe.check_slots(cfg.expert_capacity, kept, cfg.num_experts)
    check_counts(config)
    if config.log.wandb:
        import_wandb()
    model = DiT(for_this_machine(cfg))
    optimizer, schedule = make_optimizer(config)
    data = load_data(config, mesh)
    caption_length = check_data(cfg, data)

    with contextlib.ExitStack() as stack:
        # ------------------------------------------------------------ state
        checkpoints = stack.enter_context(
            RunCheckpoints(workdir, keep_last=run.keep_last, keep_every=run.keep_every)
        )
        state, resumed, origin = starting_state(
            config, workdir, checkpoints, model, optimizer, mesh, data.made_by
        )
        start = int(state.step)
        if first_process:
            print(sharding.table(state, mesh))
            print(f"{workdir}: {origin}; {describe(config, start, mesh, data)}", flush=True)
        if start >= run.steps:
            if first_process:
                print(f"{workdir}: done already")
            return state
        metadata = {"dit": dataclasses.asdict(cfg), "edm": dataclasses.asdict(edm)} | data.made_by
        hosts.from_first(
            f"begin {workdir}", lambda: begin_workdir(config, workdir, data, metadata, resumed)
        )

        # ------------------------------------------------------------ records
        writer = None
        if first_process:
            writer = MetricWriter(
                workdir,
                restored_step=None if resumed is None else start,
                tensorboard=config.log.tensorboard,
                wandb_project=config.log.wandb,
                config=config.to_dict(),
            )
            stack.callback(writer.close)
        chip = chip_of(jax.devices()[0].device_kind)
        progress = Progress(
            workdir,
            writer,
            start=start,
            total=run.steps,
            resumed=resumed or {},
            log_every=run.log_every,
            max_skipped=run.max_skipped,
            images_per_step=run.batch_size,
            flops_per_image=flops.train_flops(cfg, run.mask_ratio, caption_length),
            peak_flops=chip.bfloat16_flops if chip and cfg.dtype == "bfloat16" else None,
            dataset_names=data.names,
        )
        stack.callback(progress.close)

        # ------------------------------------------------------------ step, evaluation, data
        step_fn = make_step(config, model, optimizer, schedule, mesh, data.tower)
        evaluate = Evaluation(model, edm, mesh, data, config, workdir, writer, progress.say)
        trace = StepTrace(workdir / "profile", start + config.profile.start, config.profile.steps)

        stack.callback(trace.close)

        def place(batch):
            names = {name: batch[name] for name in ("source", "index")}
            data.check_batch(batch)
            return names, sharding.put_batch({name: batch[name] for name in data.batch_keys}, mesh)

        batches = stack.enter_context(Prefetch(data.batches(config, start), place))

        # ------------------------------------------------------------ loop
        stop = stop or stack.enter_context(StopRequest())
        stack.enter_context(memory.out_of_memory(OUT_OF_MEMORY))
        if resumed is None:
            with progress.paused():
                evaluate.losses(start, state)
        for step in range(start + 1, run.steps + 1):
            with progress.waiting_for_data():
                names, batch = next(batches)
            trace.before(step)
            first = step == start + 1
            compiling = progress.compiling() if first else contextlib.nullcontext()
            annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            with compiling, annotation, jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, batch)
            if first:
                # What compiling leaves, a third of a million objects, Python's collector would go
                # through again and again, for a fifth of a second each time (measured).
                gc.collect()
                gc.freeze()
                stack.callback(gc.unfreeze)
            trace.after(step, metrics)
            progress.push(step, metrics, names)
            checkpoints.check()

            stopping = stop.agreed()
            last = step == run.steps
            evaluating = last or step % run.eval_every == 0
            saving = last or stopping or step % run.checkpoint_every == 0
            if evaluating or saving:
                progress.catch_up()
            if evaluating:
                with progress.paused():
                    evaluate.losses(step, state)
                    evaluate.grid(step, state)
            # Last, so that whatever belongs to this step is written before the step is saved.
            if saving:
                saved = {"step": step, "config": config.to_dict(), **progress.metadata()}
                checkpoints.save(step, state, saved)
            if stopping and not last:
                checkpoints.wait()
                progress.say(f"{workdir}: stopped and saved at step {step}; same command goes on")
                break
    return state


# ------------------------------------------------------------------ several stages in a row
def train_stages(config: ConfigDict, workdir: str | Path) -> bool:
    """Trains the stages of `config.stages`, each in its folder of the workdir.

    The same call again passes over the stages that are done, and resumes in the right one. After
    each, <workdir>/report.html shows all that have begun.

    Returns:
      Whether all are done; not so after a signal.
    Raises:
      UserError: a stage that the config does not have; what `train` raises.
    """
    for name in config.stages:
        if name not in config:
            raise UserError(f"config.stages names {name}, found no such stage in the config")
        check_counts(config[name])  # the last stage's too, before the first one's days
    with StopRequest() as stop:
        for number, name in enumerate(config.stages):
            # Several processes agree in the next stage's first step.
            if stop.received and jax.process_count() == 1:
                return False
            stage, folder = config[name], Path(workdir) / name
            with RunCheckpoints(folder) as checkpoints:
                done = (checkpoints.latest_step() or 0) >= stage.train.steps
            if jax.process_index() == 0:
                print(f"stage {number + 1} of {len(config.stages)}, {name}{': done' * done}")
            if done:
                continue
            done = int(train(stage, folder, stop).step) >= stage.train.steps
            _write_report(config, Path(workdir))
            if not done:
                return False
    return True


def _write_report(config: ConfigDict, workdir: Path) -> None:
    """A page on all stages that have begun."""
    begun = [workdir / name for name in config.stages if run_checkpoint.is_run(workdir / name)]
    if jax.process_index() == 0 and begun:
        report.write(begun, workdir / "report.html")


# ------------------------------------------------------------------ telling and recording
def describe(config: ConfigDict, start: int, mesh: Mesh, data: RunData) -> str:
    """What is about to be trained, in a line."""
    run, parts = config.train, num_micro_batches(config, mesh)
    return (
        f"step {start} of {run.steps}; {sum(map(len, data.sources)):,} training and "
        f"{len(data.heldout):,} held-out pictures; mask ratio {run.mask_ratio}; {parts} "
        f"micro-batches of {run.batch_size // mesh.size // parts} images on each of {mesh.size} "
        f"devices, {jax.devices()[0].device_kind}"
    )


def begin_workdir(
    config: ConfigDict,
    workdir: Path,
    data: RunData,
    metadata: dict[str, Any],
    resumed: dict[str, Any] | None,
) -> None:
    """Writes config.json and the data's own codec; says what of the config changed on resume."""
    with disk_errors(workdir / "config.json"):
        workdir.mkdir(parents=True, exist_ok=True)
        if data.codec is not None:
            shutil.copytree(data.codec, workdir / "vae", dirs_exist_ok=True)
        run_checkpoint.write_run_metadata(
            workdir,
            metadata
            | {
                "has_ema": config.ema.enabled,
                "attribution": data.attribution,
                "config": config.to_dict(),
            },
        )
    if resumed is not None:
        for change in changes(resumed["config"], config.to_dict()):
            print(f"{workdir}: since step {resumed['step']} the config changed: {change}")


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """The values that differ between two configurations, one of them read from JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            change
            for key in keys
            for change in changes(old.get(key), new.get(key), f"{name}.{key}".strip("."))
        ]
    # JSON has no tuples.
    same = json.loads(json.dumps(old)) == json.loads(json.dumps(new))
    return [] if same else [f"{name} {old!r} -> {new!r}"]
