"""Snapshots of a run's power-function averages, <workdir>/snapshots/<step>/, and their sums.

  state/         the averages, by their lengths sigma_rel: trees like the weights
  metadata/      JSON: the step, and that after which the averages began

They are written as checkpoints are (checkpoints.run), all of them stay, and `load_average` makes an
average of any length out of them (checkpoints.profiles).
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from microdit_jax.checkpoints import profiles
from microdit_jax.checkpoints.profiles import Profile
from microdit_jax.checkpoints.restore import restore_state
from microdit_jax.checkpoints.run import RunCheckpoints
from microdit_jax.checkpoints.step_folders import SNAPSHOTS, steps_of
from microdit_jax.errors import UserError, visible
from microdit_jax.files.attempts import say
from microdit_jax.machine import hosts

NEGLIGIBLE = 1e-6  # weight of a snapshot in a sum that is not read for it


class Snapshots:
    """The snapshots of a run that trains; does nothing without an interval.

    A snapshot of a step is on disk before a checkpoint of that step or a later one is: so a run
    that resumes misses none, and takes those after its checkpoint again.

    Args:
      workdir: the run's folder.
      checkpoints: the run's, which are not written at the same time.
      averages: `training.averages.PowerAverages`, or their shapes.
      every: steps between two; 0 for none.
      start, last: the step that this command starts from, and the run's last, which has one too.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        checkpoints: RunCheckpoints,
        averages: Any,
        every: int,
        start: int,
        last: int,
    ):
        self._every, self._last = every, last
        self._store = RunCheckpoints(workdir, keep_last=1, keep_every=every, folder=SNAPSHOTS)
        if not every:
            return
        self._store.before_save, checkpoints.before_save = checkpoints.wait, self._store.wait
        self._store.go_on_from(start)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(averages.trees))
        count = -(-(last - int(averages.start)) // every)
        if jax.process_index() == 0:
            say(
                f"{visible(self._store.folder)}: a snapshot each {every} steps, up to {count} of "
                f"{size / 1e9:.3g} GB, {count * size / 1e9:.3g} GB in all"
            )

    def due(self, step: int) -> bool:
        """Returns True if this step has a snapshot; raises the error of an earlier one."""
        self._store.check()
        return self._every > 0 and (step % self._every == 0 or step == self._last)

    def save(self, step: int, averages: Any) -> None:
        """Starts to write a step's snapshot; returns once it is copied."""
        self._store.save(step, averages.trees, {"step": step, "start": int(averages.start)})

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._store.__exit__(kind, error, trace)


def load_average(
    workdir: str | os.PathLike, abstract_params: Any, length: float
) -> tuple[Any, int]:
    """Makes the average of a length up to a run's newest snapshot; all processes call it.

    Memory holds the sum and one average of one snapshot at a time.

    Args:
      abstract_params: shapes, types and shardings to restore to.
      length: sigma_rel, the standard deviation of the average's profile over the run's steps.
    Returns:
      The parameters, and the step of the newest snapshot.
    Raises:
      UserError: no snapshots, of another network, or none that can make this length.
    """
    folder = steps_of(workdir, SNAPSHOTS)
    found: list[list[int]] = hosts.from_first(
        "check the snapshots", functools.partial(_undamaged, workdir)
    )
    newest, start = found[-1]
    taken = [(step, name) for step, _ in found for name in map("{:g}".format, profiles.LENGTHS)]
    made = [Profile(step - start, profiles.exponent(float(name))) for step, name in taken]
    _check_length(length, folder.name)
    wanted = Profile(newest - start, profiles.exponent(length))
    weights, misfit = profiles.combination(made, wanted)
    if misfit > profiles.MISFIT:
        low, high = profiles.within_reach(made, newest - start)
        raise UserError(
            f"expected an ema_length from {low:g} to {high:g}, which the {len(found)} snapshots in "
            f"{visible(folder.name)} can make, found {length:g}; shorter ones take a smaller "
            "ema.snapshot_every in training"
        )
    total = None
    for (step, name), weight in zip(taken, weights, strict=True):
        if abs(weight) < NEGLIGIBLE:
            continue
        part = restore_state(folder.path / str(step), {name: abstract_params}, partial=True)[name]
        total = _times(part, weight) if total is None else _add(total, part, weight)
    return total, newest


def _undamaged(workdir: str | os.PathLike) -> list[list[int]]:
    """Lists step and start of the snapshots that are as they were written; oldest first."""
    folder = steps_of(workdir, SNAPSHOTS)
    found, faults = [], []
    for step in folder.steps():
        if fault := folder.fault(step):
            faults.append(f"step {step} is damaged: {fault}")
        else:
            found.append([step, int(folder.metadata(step)["start"])])
    if not found:
        raise UserError(
            f"expected snapshots of averages in {visible(folder.name)}, found "
            f"{'; '.join(faults) or 'none'}; train with ema.snapshot_every set, or leave out the "
            "ema_length"
        )
    if faults:
        say(f"{folder.name}: {'; '.join(faults)}; making do without")
    return [row for row in found if row[1] == found[-1][1]]


def _check_length(length: float, place: str) -> None:
    if not 0 < length <= profiles.LONGEST:
        raise UserError(
            f"expected an ema_length above 0 and up to {profiles.LONGEST:.4f}, the plain mean of "
            f"all steps, found {length:g}; the averages in {visible(place)} are of "
            f"{' and '.join(map('{:g}'.format, profiles.LENGTHS))}"
        )


@functools.partial(jax.jit, donate_argnums=0)
def _times(part: Any, weight: Any) -> Any:
    return jax.tree.map(lambda p: jnp.asarray(weight, p.dtype) * p, part)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Any, part: Any, weight: Any) -> Any:
    return jax.tree.map(lambda t, p: t + jnp.asarray(weight, p.dtype) * p, total, part)
