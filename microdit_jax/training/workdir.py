"""A run's folder: one job's alone, with the configuration on record and what changed in it."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from microdit_jax.checkpoints.run import write_run_metadata
from microdit_jax.checkpoints.step_folders import CHECKPOINTS, SNAPSHOTS
from microdit_jax.errors import UserError, visible
from microdit_jax.files import OutputFolder, disk_errors, output_folder
from microdit_jax.files.urls import scheme_of
from microdit_jax.training.data import RunData
from microdit_jax.training.evaluation import DUE_FILE, evaluations_due

# What a run on a bucket goes on without: checkpoints, which Orbax reads itself, and what only
# people look at.
_NOT_FETCHED = (
    CHECKPOINTS, SNAPSHOTS, "damaged", "tensorboard", "profile", "nonfinite", "wandb",
)  # fmt: skip


def opened(workdir: str | os.PathLike, stack: contextlib.ExitStack) -> OutputFolder:
    """Opens the workdir until the stack ends; one on a bucket has a local folder in its place.

    Raises:
      UserError: it cannot be written, or the store is one that Orbax cannot write to.
    """
    if scheme_of(workdir) not in ("", "gs"):
        raise UserError(
            f"expected a workdir on a disk or in a gs:// bucket, found {visible(workdir)}; Orbax "
            "writes checkpoints to no other store: train on a disk, and copy the folder afterwards "
            "(aws s3 sync)"
        )
    return stack.enter_context(
        output_folder(
            workdir,
            fetch=lambda name: name not in _NOT_FETCHED and not name.startswith("compiled"),
            push=jax.process_index() == 0,
        )
    )


def left_to_evaluate(workdir: str | os.PathLike, step: int) -> list[str]:
    """Returns the names of the evaluators that a stop at this step has left out."""
    if not scheme_of(workdir):
        return evaluations_due(Path(workdir), step)
    with output_folder(workdir, fetch=lambda name: name == DUE_FILE, push=False) as output:
        return evaluations_due(output.path, step)


def begin_workdir(
    config: ConfigDict,
    workdir: Path,
    data: RunData,
    networks: dict[str, Any],
    resumed: dict[str, Any] | None,
) -> None:
    """Writes config.json and the codec that the data made; prints what changed since a resume.

    Args:
      networks: what describes network, noise levels and towers in config.json.
      resumed: what was saved beside the state that the run resumes from, None at a stage's start.
    """
    with disk_errors(workdir / "config.json"):
        workdir.mkdir(parents=True, exist_ok=True)
        if data.codec is not None:
            shutil.copytree(data.codec, workdir / "vae", dirs_exist_ok=True)
        about = {
            "has_ema": config.ema.enabled,
            "attribution": data.attribution,
            "config": config.to_dict(),
        }
        write_run_metadata(workdir, networks | about)
    if resumed is not None:
        for change in changes(resumed["config"], config.to_dict()):
            since = f"{workdir}: since step {resumed['step']} the config changed: {change}"
            print(visible(since))


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """Lists the values that differ between two configurations, one of them read from JSON."""
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
