"""Loads parameters without optimiser state, to sample with or to start another run from."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from microdit_jax import sharding
from microdit_jax.checkpoints import model_folder
from microdit_jax.checkpoints.model_folder import Params
from microdit_jax.checkpoints.restore import good_step, restore_state, steps_on_disk
from microdit_jax.checkpoints.run import is_run, read_run_metadata
from microdit_jax.checkpoints.snapshots import load_average
from microdit_jax.checkpoints.step_folders import CHECKPOINTS
from microdit_jax.errors import UserError, visible
from microdit_jax.machine import hosts
from microdit_jax.machine.placement import fetch
from microdit_jax.models import lora
from microdit_jax.models.lora import Adapted


def load_run_params(
    workdir: str | os.PathLike,
    abstract_params: Any,
    *,
    ema: bool,
    step: int | None = None,
    ema_length: float | None = None,
) -> tuple[Params, int]:
    """Loads the newest undamaged parameters of a training run, without its optimiser state.

    Args:
      step: of another checkpoint than the newest.
      abstract_params: shapes, types and shardings to restore to.
      ema: load the moving average instead of the raw parameters.
      ema_length: make the average of this length from the run's snapshots instead.
    Returns:
      The parameters and the step.
    Raises:
      UserError: no good checkpoint, or of another network, or without an average; as
        `snapshots.load_average` does.
    """
    if ema_length is not None:
        return load_average(workdir, abstract_params, ema_length)
    step, _ = good_step(workdir, step)
    folder, name = Path(workdir).absolute() / CHECKPOINTS / str(step), "ema" if ema else "params"
    if ema and not read_run_metadata(workdir, "has_ema")["has_ema"]:
        raise UserError(
            f"expected an average of the weights in {workdir}, found none; use ema=False"
        )
    return restore_state(folder, {name: abstract_params}, partial=True)[name], step


def load_earlier_params(
    workdir: str | os.PathLike, params: Params, step: int | None
) -> tuple[Params, str]:
    """Loads the parameters of an earlier checkpoint, the moving average where the run keeps one.

    Args:
      params: the newest ones, for shapes, types and shardings.
      step: of the checkpoint; None: the oldest that is there.
    Returns:
      The parameters, and a description of them in words.
    Raises:
      UserError: there is no such checkpoint, or none but the newest.
    """
    steps = steps_on_disk(workdir)
    if step is None and len(steps) < 2:
        raise UserError(
            f"autoguidance takes an earlier checkpoint of {visible(workdir)}, found {len(steps)} "
            "in all; train with a train.keep_every, or name another network"
        )
    step = steps[0] if step is None else step
    ema = read_run_metadata(workdir, "has_ema")["has_ema"]
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params
    )
    found, step = load_run_params(workdir, abstract, ema=ema, step=step)
    return found, describe_weights(workdir, step, ema=ema)


def describe_weights(
    workdir: str | os.PathLike, step: int, *, ema: bool, ema_length: float | None = None
) -> str:
    """Says in words which weights of a training run were loaded."""
    which = "moving average" if ema else "raw weights"
    if ema_length is not None:
        which = f"average of length {ema_length:g}"
    return f"{workdir}, step {step}, {which}"


def load_weights(
    source: str | os.PathLike, abstract_params: Any, *, ema: bool = True
) -> tuple[Params, str]:
    """Loads the parameters of a training run or a model folder (python -m convert) to start from.

    The network may be made for another resolution: a network's parameters do not depend on it, as
    the position embedding, which a released checkpoint stores, is computed from the config here.

    Args:
      source: the run's workdir, or the folder.
      abstract_params: shapes, types and shardings to restore to.
      ema: load the moving average of a run that keeps one.
    Returns:
      The parameters, and a description of them in words.
    Raises:
      UserError: nothing usable there, damaged, or of another network.
    """
    if is_run(source):
        ema = ema and read_run_metadata(source, "has_ema")["has_ema"]
        params, step = load_run_params(source, abstract_params, ema=ema)
        return params, describe_weights(source, step, ema=ema)
    metadata = model_folder.read_metadata(source)
    hosts.from_first("check the weights", lambda: model_folder.verify_model(source))
    model_folder.check_network(source, abstract_params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params)
    params, _ = model_folder.load_model(source, sharding=shardings, verify=False)
    params = jax.tree.map(lambda p, leaf: p.astype(leaf.dtype), params, abstract_params)
    return params, f"{source}, a {metadata['kind']} model folder"


def weights_digest(params: Any) -> str:
    """Returns the sha256 of the names and values of all weights, wherever they are."""
    digest = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ):
        digest.update(path.encode())
        values = fetch(leaf) if isinstance(leaf, jax.Array) else leaf
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def load_adapters(
    workdir: str | os.PathLike,
    adapted: Adapted,
    params: Params,
    *,
    ema: bool,
    ema_length: float | None = None,
) -> tuple[Params, int]:
    """Loads the adapters of a run, to where the network's weights are; returns the step too.

    Args:
      params: weights of the network that they belong to, or their shapes, types and shardings.
      ema, ema_length: as `load_run_params` takes them.
    """
    load = functools.partial(load_run_params, workdir, ema=ema, ema_length=ema_length)
    shapes = jax.eval_shape(adapted.lora.init, params, jax.random.key(0))
    here = jax.tree.leaves(params)[0].sharding
    if isinstance(here, NamedSharding):
        return load(sharding.with_shardings(shapes, here.mesh))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes
    )
    return load(abstract)


def load_merged(
    workdir: str | os.PathLike,
    adapted: Adapted,
    params: Params,
    name: str,
    *,
    ema: bool,
    ema_length: float | None = None,
) -> tuple[Params, int]:
    """Loads the adapters of a run and merges them into a network's weights; returns the step too.

    Args:
      params: weights of the network; `name` tells a person which.
      ema, ema_length: as `load_run_params` takes them.
    Raises:
      UserError: they are not those that the adapters were trained for.
    """
    if weights_digest(params) != adapted.weights:
        raise UserError(
            f"expected the network whose adapters {visible(workdir)} holds, "
            f"{visible(adapted.base)}, found other weights at {visible(name)}; give the network "
            "that it was trained from as its base"
        )
    adapters, step = load_adapters(workdir, adapted, params, ema=ema, ema_length=ema_length)
    return lora.merged(adapted.lora, params, adapters), step
