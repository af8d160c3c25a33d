"""The train state that a stage starts from."""

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from microdit_jax.assets import hub, instant, load
from microdit_jax.checkpoints.fetch import local_model
from microdit_jax.checkpoints.model_folder import is_model
from microdit_jax.checkpoints.run import RunCheckpoints, is_run, read_run_metadata
from microdit_jax.checkpoints.weights import load_weights
from microdit_jax.errors import UserError
from microdit_jax.files.urls import as_given, scheme_of
from microdit_jax.machine import hosts
from microdit_jax.models.dit import DiT
from microdit_jax.training import averages, uncertainty
from microdit_jax.training import step as train_step
from microdit_jax.training.source import (
    Frozen,
    abstract_adapters,
    check_same,
    check_shapes,
    new_adapters,
)
from microdit_jax.training.step import TrainState
from microdit_jax.training.teacher import Teacher

INIT_STREAM = 0x1217  # keeps the initialisation's key apart from those of the steps


class Start(NamedTuple):
    """The first state of a run.

    Attributes:
      resumed: what the checkpoint holds beside the state, if the run resumes, else None.
      description: the state's origin, in words.
    """

    state: TrainState
    resumed: dict[str, Any] | None
    description: str


def starting_state(
    config: ConfigDict,
    workdir: str | Path,
    checkpoints: RunCheckpoints,
    model: DiT,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    made_by: dict[str, str],
    teacher: Teacher | None = None,
    frozen: Frozen | None = None,
) -> Start:
    """Returns the state from the first of these sources that there is:

    1. the newest good checkpoint of this workdir: the same command resumes;
    2. config.init_from: the full state of another run (weights, optimiser, average, step), from
       which the next stage goes on;
    3. config.init_weights_from: weights alone, of another run (its average, if it keeps one), of a
       checkpoint's file or folder, of a model known by its name. The optimiser and the step start
       anew. The resolution may be another: the position embedding is computed, so no weight
       depends on it;
    4. the teacher's weights, of a student;
    5. scratch: the initialisation.

    With `frozen` weights the state is that of their adapters, from 1 or new. Averages for snapshots
    begin where the run does not resume, a learned uncertainty in all but 1 and 2.

    Args:
      made_by: names of the VAE and the text encoder of this run's data; another run's must be the
        same in 2 and 3.
    Raises:
      UserError: nothing usable there, or of another network or data.
    """
    if frozen is not None:
        return _adapters(config, workdir, checkpoints, optimizer, mesh, made_by, frozen)
    with_ema = config.ema.enabled
    abstract = train_step.abstract_state(model, optimizer, mesh, with_ema=with_ema)
    full, alone = (source_path(config[key], workdir) for key in ("init_from", "init_weights_from"))
    # ---------------------------------------------------------------- 1. resume
    if checkpoints.latest_step() is not None:
        state, saved = checkpoints.restore(_as_saved(config, abstract))
        record = None if teacher is None else teacher.record
        check_same(workdir, saved, "teacher", record and record.weights, record and record.teacher)
        check_same(workdir, saved, "adapted", None, None)
        return Start(state, saved, "resumed")
    # ---------------------------------------------------------------- 2. another run's full state
    if full:
        full = str(local_model(full))
        _check_source("init_from", full, made_by)
        state = _full_state(full, abstract)
        step = int(state.step)
        if step >= config.train.steps:
            raise UserError(
                f"train.steps counts from the start of {full}, which is at step {step} already, "
                f"found {config.train.steps}; raise it"
            )
        return _fresh(config, state, f"full state of {full}, step {step}")
    # ---------------------------------------------------------------- 3. weights alone
    if alone:
        alone = str(local_model(alone))
        _check_source("init_weights_from", alone, made_by)
        params, description = _weights(alone, abstract.params, mesh)
        create = functools.partial(TrainState.create, optimizer=optimizer, with_ema=with_ema)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)
        return _fresh(config, state, f"weights of {description}")
    # ---------------------------------------------------------------- 4. the teacher's weights
    if teacher is not None:
        check_shapes(teacher.params, abstract.params, teacher.description, arch="teacher")
        create = functools.partial(TrainState.create, optimizer=optimizer, with_ema=with_ema)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.jit(create, out_shardings=shardings)(teacher.params)
        return _fresh(config, state, f"student of {teacher.description}")
    # ---------------------------------------------------------------- 5. scratch
    key = jax.random.fold_in(jax.random.key(config.seed), INIT_STREAM)
    state = train_step.sharded_init(model, optimizer, key, mesh, with_ema=with_ema)
    return _fresh(config, state, "scratch")


def _adapters(
    config: ConfigDict,
    workdir: str | Path,
    checkpoints: RunCheckpoints,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    made_by: dict[str, str],
    frozen: Frozen,
) -> Start:
    """Returns the state of frozen weights' adapters: the newest checkpoint's, or a new one."""
    _check_source("init_weights_from", config.init_weights_from, made_by)
    shapes = jax.eval_shape(lambda params: params, frozen.params)
    lora, with_ema = frozen.record.lora, config.ema.enabled
    abstract = abstract_adapters(lora, shapes, optimizer, mesh, with_ema=with_ema)
    if checkpoints.latest_step() is not None:
        state, saved = checkpoints.restore(_as_saved(config, abstract))
        check_same(workdir, saved, "adapted", frozen.record.weights, frozen.record.base)
        return Start(state, saved, "resumed")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    key = jax.random.fold_in(jax.random.key(config.seed), INIT_STREAM)
    create = functools.partial(new_adapters, lora, shapes, optimizer, with_ema=with_ema)
    state = jax.jit(create, out_shardings=shardings)(key)
    return _fresh(config, state, f"adapters of rank {lora.rank} of {frozen.description}")


def _fresh(config: ConfigDict, state: TrainState, description: str) -> Start:
    """Returns the start of a run that does not resume; its averages for snapshots begin here."""
    state = averages.begun(state) if config.ema.snapshot_every else state
    if not config.loss.learned_uncertainty:
        if state.uncertainty is not None:
            description += "; its learned uncertainty is left out"
        return Start(state.replace(uncertainty=None), None, description)
    if state.uncertainty is None:
        state = uncertainty.begun(state)
        description += "; the learned uncertainty begins at 0"
    return Start(state, None, description)


def _as_saved(config: ConfigDict, abstract: TrainState) -> TrainState:
    """Returns the state as this run's own checkpoints hold it."""
    return with_options(abstract, config.ema.snapshot_every, config.loss.learned_uncertainty)


def with_options(abstract: TrainState, snapshots: Any, uncertain: Any) -> TrainState:
    """Returns a state of shapes with what a configuration adds to it.

    Args:
      snapshots, uncertain: true with ema.snapshot_every, and with loss.learned_uncertainty.
    """
    abstract = averages.abstract(abstract) if snapshots else abstract
    return uncertainty.abstract(abstract) if uncertain else abstract


def source_path(name: str, workdir: str | Path) -> str:
    """Returns the path that a config's `init_from` names, or "" for none."""
    # Normalised: "folder/../other" cannot be opened before the folder exists.
    path = os.path.normpath(name.replace("{workdir}", str(workdir))) if name else ""
    return as_given(path) if scheme_of(path) else path


def _weights(source: str, abstract_params: Any, mesh: Mesh) -> tuple[Any, str]:
    """Loads the weights of whatever sample_main.py takes as --model."""
    if is_run(source) or is_model(source):
        return load_weights(source, abstract_params)
    model = load.load_model(source, mesh=mesh)
    check_shapes(model.params, abstract_params, model.description, arch="source")
    params = jax.tree.map(lambda p, leaf: p.astype(leaf.dtype), model.params, abstract_params)
    return params, model.description


def _full_state(source: str, abstract: TrainState) -> TrainState:
    """Restores another run's newest state; adds or drops the average, as this run's config says."""
    about = read_run_metadata(source, "has_ema")
    has_ema = about["has_ema"]
    stored = abstract.replace(ema=abstract.params if has_ema else None)
    then = about.get("config") or {}
    snapshots = (then.get("ema") or {}).get("snapshot_every")
    uncertain = (then.get("loss") or {}).get("learned_uncertainty")
    stored = with_options(stored, snapshots, uncertain)
    with RunCheckpoints(source) as earlier:
        state, _ = earlier.restore(stored)
    state = state.replace(averages=None)  # this run's own begin with it
    if abstract.ema is None:
        return state.replace(ema=None)
    if has_ema:
        return state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=shardings)
    return state.replace(ema=copy(state.params))


def _check_source(key: str, source: str, made_by: dict[str, str]) -> None:
    """Raises UserError if there is nothing, or a run trained with another VAE or text encoder."""

    def names() -> dict[str, str]:
        path = instant.find_shipped(Path(source))
        if is_run(path) or instant.is_shipped(path):
            metadata = read_run_metadata(path, *made_by)
            return {kind: metadata[kind] for kind in made_by}
        known = Path(source).exists() or source.removesuffix(".pt") in hub.RELEASED
        if key == "init_from" or not known:
            raise UserError(
                f"expected a training run at {source}, which config.{key} names, found none; train "
                f"that stage first, or give another by --config.{key}"
            )
        return {}  # a model folder does not say

    for kind, found in hosts.from_first("read what the run starts from", names).items():
        if found != made_by[kind]:
            raise UserError(
                f"{source} was trained with the {kind} {found}, found data made with "
                f"{made_by[kind]}; use the same, or another run to start from"
            )
