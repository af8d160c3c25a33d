"""Training: one stage read top to bottom, and several in a row."""

import contextlib
import dataclasses
import functools
import gc
import os
import sys
import time
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from microdit_jax import sharding
from microdit_jax.checkpoints.run import RunCheckpoints, is_run
from microdit_jax.checkpoints.snapshots import Snapshots
from microdit_jax.data.pipeline import Record
from microdit_jax.data.prefetch import Prefetch
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import LONGEST, visible
from microdit_jax.machine import agreement, hosts, memory, slices, watch
from microdit_jax.machine.chips import chip_of
from microdit_jax.machine.claim import claimed
from microdit_jax.machine.signals import Phase, StopRequest
from microdit_jax.models import flops
from microdit_jax.models.dit import DiT, for_this_machine
from microdit_jax.training import report, state_table
from microdit_jax.training.config import (
    check,
    make_optimizer,
    make_step,
    missing_folders,
    model_config,
    num_micro_batches,
    over_forward,
)
from microdit_jax.training.data import RunData, check_data, load_data
from microdit_jax.training.evaluation import Evaluations, evaluations_due
from microdit_jax.training.evaluators.base import EvaluationContext
from microdit_jax.training.goodput import Goodput
from microdit_jax.training.loss import Batch
from microdit_jax.training.metric_writer import MetricWriter
from microdit_jax.training.profiling import REQUEST, StepTrace
from microdit_jax.training.progress import Progress
from microdit_jax.training.replicas import ReplicaCheck
from microdit_jax.training.saved_step import SavedStep
from microdit_jax.training.source import filled_in, load_frozen, with_whole_weights
from microdit_jax.training.start import starting_state
from microdit_jax.training.step import TrainState
from microdit_jax.training.teacher import load_teacher
from microdit_jax.training.workdir import begin_workdir, left_to_evaluate, opened

OUT_OF_MEMORY = (
    "a smaller train.micro_batch_size, model.options.remat=block, or more devices over mesh.fsdp"
)


def train(config: ConfigDict, workdir: str | Path, stop: StopRequest | None = None) -> TrainState:
    """Trains one stage; the same call again resumes, and returns at once when all is done.

    All processes call it. On SIGTERM or SIGINT it saves and returns early.

    Leaves in the workdir: config.json, checkpoints/, metrics.jsonl (a line each `log_every` steps
    and each evaluation), tensorboard/, samples/, report.html, nonfinite/ where updates were
    skipped, profile/ where asked for, and vae/ where the data made their codec.

    Args:
      stop: of the whole command, so that no signal is lost between two stages; its `acted` says
        that the run stopped before its end.
    Returns:
      The last state.
    Raises:
      UserError: a config that cannot be run, data or checkpoints that do not fit it, too many
        updates in a row that are not finite.
    """
    run = config.train
    first_process = jax.process_index() == 0
    # ---------------------------------------------------------------- mesh, network, data
    mesh = sharding.make_mesh(**config.mesh)
    hosts.connect(mesh)
    config, teacher = load_teacher(filled_in(config), mesh)
    check(config, mesh)
    cfg, edm = model_config(config), EdmConfig(**config.edm)
    model = DiT(for_this_machine(cfg))
    frozen = load_frozen(config, cfg, mesh)
    optimizer, schedule = make_optimizer(config)

    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        stop.phase = Phase.STARTING
        output = opened(workdir, stack)
        workdir = output.path
        goodput = Goodput(workdir, writes=first_process)
        stack.callback(goodput.close)
        claim = claimed(workdir, stack, place=output.name)
        data = load_data(config, mesh)
        caption_length = check_data(cfg, data)
        agreement.agree(data.facts())
        # ------------------------------------------------------------ state
        checkpoints = stack.enter_context(
            RunCheckpoints(output.name, keep_last=run.keep_last, keep_every=run.keep_every)
        )
        reading = checkpoints.latest_step() is not None or config.init_from
        with goodput.spent_on("restore" if reading or config.init_weights_from else "start"):
            state, resumed, origin = starting_state(
                config, output.name, checkpoints, model, optimizer, mesh, data.made_by, teacher,
                frozen,
            )  # fmt: skip
        start = int(state.step)
        watch.at_step(start, saved=checkpoints.newest)
        due = [] if resumed is None else evaluations_due(workdir, start)
        if first_process:
            print(state_table.table(state, mesh))
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
            if warning := slices.crossing_warning(mesh, size):
                print(f"warning: {warning}", file=sys.stderr, flush=True)
            begun = f"{workdir}: {origin}; {describe(config, start, mesh, data)}"
            print(visible(begun, LONGEST), flush=True)
        if start >= run.steps and not due:
            if first_process:
                print(f"{workdir}: done already")
            return state
        networks = {"dit": dataclasses.asdict(cfg), "edm": dataclasses.asdict(edm)} | data.made_by
        for kind, part in (("student", teacher), ("adapted", frozen)):
            networks |= {} if part is None else {kind: dataclasses.asdict(part.record)}
        hosts.from_first(
            "begin the workdir", lambda: begin_workdir(config, workdir, data, networks, resumed)
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
            writer.mark_restart(goodput.restarts, step=start, reached=goodput.reached)
        chip = chip_of(jax.devices()[0].device_kind)
        progress = Progress(
            workdir,
            writer,
            goodput,
            start=start,
            total=run.steps,
            resumed=resumed or {},
            log_every=run.log_every,
            max_skipped=run.max_skipped,
            images_per_step=run.batch_size,
            flops_per_image=over_forward(config)
            * flops.forward_flops(cfg, run.mask_ratio, caption_length),
            peak_flops=chip.bfloat16_flops if chip and cfg.dtype == "bfloat16" else None,
            dataset_names=data.names,
        )
        stack.callback(progress.close)
        stack.callback(goodput.end)

        # ------------------------------------------------------------ step, evaluation, data
        step_fn = make_step(config, model, optimizer, schedule, mesh, data.tower)
        step_fn = SavedStep(step_fn, config, mesh, progress.say)

        merged = functools.partial(with_whole_weights, frozen=frozen)

        def between_parts() -> None:
            goodput.beat()
            stop.check()

        evaluations = Evaluations(
            EvaluationContext(
                config, workdir, model, edm, mesh, data, writer, progress.say, between_parts,
                None if teacher is None else teacher.record,
            ),
            stop,
        )  # fmt: skip
        replicas = ReplicaCheck(mesh, state, every=run.replica_check_every)
        every = config.ema.snapshot_every
        snapshots = Snapshots(output.name, checkpoints, state.averages, every, start, run.steps)
        stack.enter_context(snapshots)
        trace = StepTrace(
            workdir / "profile",
            start + config.profile.start,
            config.profile.steps,
            request=workdir / REQUEST,
            clock=time.monotonic,
            writing=lambda: progress.paused("profile"),
        )
        stack.callback(trace.close)

        def to_devices(batch: Record) -> tuple[Record, Batch]:
            names = {name: batch[name] for name in ("source", "index")}
            data.check_batch(batch)
            return names, sharding.put_batch({name: batch[name] for name in data.batch_keys}, mesh)

        held = [part.params for part in (teacher, frozen) if part is not None]
        batches = stack.enter_context(Prefetch(data.batches(config, start), to_devices))

        # ------------------------------------------------------------ loop
        stack.enter_context(memory.out_of_memory(OUT_OF_MEMORY))
        stack.enter_context(watch.reported())
        goodput.begin(start)
        with progress.paused("evaluation"):
            first_evaluation = evaluations.at_start if resumed is None else due
            if not evaluations.run(start, merged(state), first_evaluation):
                progress.say(f"{workdir}: stopped before a step; the same command goes on")
                return state
        for step in range(start + 1, run.steps + 1):
            with progress.waiting_for_data():
                names, batch = next(batches)
            trace.before(step)
            first = step == start + 1
            compiling = progress.compiling() if first else contextlib.nullcontext()
            if first:
                stop.phase = Phase.STARTING  # compiling may take minutes, and there is no new step
            annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            with compiling, annotation, jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, batch, *held)
            if first:
                stop.phase = Phase.TRAINING
                # Tracing and compiling leave 300,000 Python objects behind. Freezing exempts them
                # from garbage collection; scanning them took 0.2 s at a time (measured).
                gc.collect()
                gc.freeze()
                stack.callback(gc.unfreeze)
            trace.after(step, metrics)
            progress.push(step, metrics, names)
            replicas.push(step, state)
            checkpoints.check()
            if claim is not None:
                claim.check()
            watch.at_step(step, saved=checkpoints.newest)

            stopping = stop.agreed()
            last = step == run.steps
            evaluating = last or step % run.eval_every == 0
            if evaluating or stopping or step % run.checkpoint_every == 0:
                if claim is not None:  # a workdir that is gone is not made anew
                    claim.check(now=True)
                progress.catch_up()
            if evaluating and not stopping:
                with progress.paused("evaluation"):
                    stopping = not evaluations.run(step, merged(state))
            elif evaluating:
                evaluations.postpone(step)
            # Saved last: all records of a step are on disk before its checkpoint, so a resume from
            # the checkpoint misses none of them.
            saving = last or stopping or step % run.checkpoint_every == 0
            if saving or snapshots.due(step):
                replicas.push(step, state, now=True)
                if claim is not None:
                    claim.check(now=True)
            if snapshots.due(step):
                with goodput.spent_on("save"):
                    snapshots.save(step, state.averages)
            if saving:
                saved = {"step": step, "config": config.to_dict(), **progress.metadata()}
                for kind, part in (("teacher", teacher), ("adapted", frozen)):
                    saved |= {} if part is None else {kind: part.record.weights}
                with goodput.spent_on("save"):
                    output.flush()
                    checkpoints.save(step, state, saved)
            if stopping:
                stop.acted = True
                with goodput.spent_on("save"):
                    checkpoints.wait()
                progress.say(f"{workdir}: stopped and saved at step {step}; same command goes on")
                break
    return state


def describe(config: ConfigDict, start: int, mesh: Mesh, data: RunData) -> str:
    """Says in one line what is about to be trained."""
    run, parts = config.train, num_micro_batches(config, mesh)
    return (
        f"step {start} of {run.steps}; {sum(map(len, data.sources)):,} training and "
        f"{len(data.heldout):,} held-out images; mask ratio {run.mask_ratio}; {parts} "
        f"micro-batches of {run.batch_size // mesh.size // parts} images on each of {mesh.size} "
        f"devices, {jax.devices()[0].device_kind}{slices.described()}"
    )


# ------------------------------------------------------------------ several stages in a row
def train_stages(config: ConfigDict, workdir: str | Path, stop: StopRequest | None = None) -> bool:
    """Trains the stages of `config.stages`, each in its folder of the workdir.

    All stages are checked before the first one starts. The same call again passes over the stages
    that are done, and resumes in the right one. After each, <workdir>/report.html shows all that
    have begun.

    Returns:
      True if all are done, False after a signal.
    Raises:
      UserError: a stage that the config does not have, or could not run; what `train` raises.
    """
    first_process = jax.process_index() == 0
    check(config)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        for position, name in enumerate(config.stages):
            # With several processes, all agree to stop in the next stage's first step instead.
            if stop.received and jax.process_count() == 1:
                stop.acted = True
                return False
            stop.phase = Phase.STARTING
            stage, folder = config[name], os.path.join(workdir, name)
            with RunCheckpoints(folder) as checkpoints:
                step = checkpoints.latest_step() or 0
            done = step >= stage.train.steps and not left_to_evaluate(folder, step)
            if first_process:
                print(f"stage {position + 1} of {len(config.stages)}, {name}{': done' * done}")
            if done:
                continue
            if first_process:
                _say_what_is_missing(config, config.stages[position + 1 :])
            train(stage, folder, stop)
            if first_process:
                folders = [os.path.join(workdir, name) for name in config.stages]
                if begun := [folder for folder in folders if is_run(folder)]:
                    report.write(begun, os.path.join(workdir, "report.html"))
            if stop.acted:
                return False
    return True


def train_all(config: ConfigDict, workdir: str | Path) -> bool:
    """Trains the stages that a config chains, or the one that it is.

    Returns:
      True if all is done, False if a signal stopped it: it has saved, and the same call goes on.
    """
    with StopRequest() as stop:
        stop.phase = Phase.STARTING
        agreement.agree(agreement.software() | agreement.flat({"config": config.to_dict()}))
        agreement.agree(agreement.devices())
        if "stages" in config:
            return train_stages(config, workdir, stop)
        train(config, workdir, stop)
        return not stop.acted


def _say_what_is_missing(config: ConfigDict, later: tuple[str, ...]) -> None:
    """Prints which data folders the stages after this one need and do not find yet."""
    for name in later:
        if folders := missing_folders(config[name]):
            print(f"stage {name} will need data that is not there yet: {', '.join(folders)}")
