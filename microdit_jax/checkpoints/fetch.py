"""Runs and model folders on a bucket: a local copy of what is needed to use their weights."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from microdit_jax.checkpoints.step_folders import CHECKPOINTS, COMMITTED, MANIFEST, SNAPSHOTS, STEP
from microdit_jax.files import fetched

# Of a run, what its checkpoints and what a report of it do not need.
_LEFT_OUT = ("damaged", "tensorboard", "profile", "nonfinite", "wandb", "compiled")
_STEPS = (CHECKPOINTS, SNAPSHOTS)


def local_model(path: str | os.PathLike, *, snapshots: bool = False) -> Path:
    """Returns a model file, a model folder or a run as a local path; fetches it from a bucket.

    Of a run the newest checkpoint alone is fetched, beside its small files; or its snapshots alone.

    Raises:
      UserError: nothing there, or no right to it.
    """
    return fetched(path, choose=_with_snapshots if snapshots else _needed)


def local_records(path: str | os.PathLike) -> Path:
    """Returns a run's folder as a local path, without its checkpoints if it is on a bucket."""
    return fetched(path, choose=_without_steps)


def _needed(names: Collection[str]) -> Iterable[str]:
    steps = {parts[1] for name in names if len(parts := name.split("/")) > 2
             and parts[0] == CHECKPOINTS and STEP.fullmatch(parts[1])}  # fmt: skip
    whole = [s for s in steps if {f"checkpoints/{s}/{COMMITTED}", f"checkpoints/{s}/{MANIFEST}"}
             <= set(names)]  # fmt: skip
    # A run that was copied from a disk has no commit files.
    whole = whole or [s for s in steps if f"checkpoints/{s}/{MANIFEST}" in names]
    newest = f"checkpoints/{max(whole, key=int)}/" if whole else "checkpoints/ "
    return [*_without_steps(names), *(n for n in names if n.startswith(newest))]


def _with_snapshots(names: Collection[str]) -> Iterable[str]:
    return [*_without_steps(names), *(n for n in names if n.startswith(f"{SNAPSHOTS}/"))]


def _without_steps(names: Collection[str]) -> list[str]:
    return [
        name
        for name in names
        if not name.startswith((*(f"{top}/" for top in (*_LEFT_OUT, *_STEPS)), "compiled-"))
    ]
