"""Checkpoints of a training run, <workdir>/checkpoints/<step>/, by Orbax, with checksums.

  state/         the whole TrainState, average of the weights included
  metadata/      JSON: the run's config and the position in the data
  manifest.json  size and sha256 of every file above

The manifest is written before Orbax commits a step by renaming its folder: a step is there whole,
with its manifest, or not at all, and one without a good manifest was damaged later. Orbax restores
a damaged file without an error, so restoring checks the manifest first and falls back to the newest
undamaged step. With several processes the workdir must be one shared file system or a folder of a
gs:// bucket: each writes its shards, and process 0 alone hashes files and chooses the step for all.
"""

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from microdit_jax.checkpoints import packing
from microdit_jax.checkpoints.fetch import local_records
from microdit_jax.checkpoints.library_logs import drop_tracebacks_of_orbax
from microdit_jax.checkpoints.manager import Manager, make_manager, writers_of
from microdit_jax.checkpoints.model_folder import VERSION
from microdit_jax.checkpoints.restore import good_step, restore_state
from microdit_jax.checkpoints.step_folders import CHECKPOINTS, steps_of
from microdit_jax.errors import UserError, visible
from microdit_jax.files import read_json, write_json
from microdit_jax.files.attempts import fault_of
from microdit_jax.files.bucket import Bucket
from microdit_jax.files.urls import scheme_of
from microdit_jax.machine import hosts, watch
from microdit_jax.machine.background import give_way

RUN_FORMAT = "microdit_jax.run"
SAVE_SECONDS = 1800.0  # limit for one save to be on disk


class RunCheckpoints:
    """The checkpoints of one run. Reading never changes a file; the first save makes the folder.

    Saving is asynchronous: training goes on while the state is written. If a save fails, the next
    call of any method raises its error.

    Args:
      workdir: the run's folder.
      keep_last: how many of the newest steps stay on disk, which needs room for one more.
      keep_every: steps that are multiples of it are never deleted; 0 for none.
      timeout_seconds: how long a save may take.
      folder: of the steps, in the workdir.

    Attributes:
      before_save: called before a save begins: what else is written must be done by then.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        timeout_seconds: float = SAVE_SECONDS,
        folder: str = CHECKPOINTS,
    ):
        if keep_last < 1 or keep_every < 0:
            raise UserError(
                "keep_last must be at least 1 and keep_every at least 0, found "
                f"{keep_last} and {keep_every}"
            )
        drop_tracebacks_of_orbax()
        self.before_save: Callable[[], None] = lambda: None
        self._workdir, self._folders = workdir, steps_of(workdir, folder)
        self.folder = self._folders.path
        self._keep, self._timeout = (keep_last, keep_every), timeout_seconds
        self._manager: Manager | None = None
        # Orbax's threads are started by this one and share its priority.
        self._executor = concurrent.futures.ThreadPoolExecutor(1, initializer=give_way)
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._newest: int | None = None  # step last saved or restored
        self._writers: set[int] = set()  # processes with a part of the step being saved
        self._rows: dict[str, np.ndarray] = {}  # memory for packed arrays; one save at a time

    @property
    def newest(self) -> int | None:
        """The step last saved or restored, on disk and whole; None before either."""
        return self._newest

    def all_steps(self) -> list[int]:
        """Returns the steps that were written whole, oldest first; not checked for damage."""
        return hosts.from_first("list checkpoints", self._folders.steps)

    def latest_step(self) -> int | None:
        """Returns the newest of `all_steps`; None if there is none."""
        return max(self.all_steps(), default=None)

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Starts to write the state; returns once it is copied, so that it may be donated.

        The step saved or restored last is left alone. Newer ones, which `restore` found damaged,
        move to <workdir>/damaged/ first.

        Args:
          state: tree of jax arrays; None leaves are allowed.
          metadata: values that JSON can hold, such as config, seed and step.
        Raises:
          UserError: the save before this failed, the disk is full, or processes are missing.
        """
        self.wait()
        if step == self._newest:
            return
        self.before_save()
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        hosts.from_first(f"prepare checkpoint {step}", lambda: self._prepare(step, num_bytes))
        if self._manager is None:
            self._manager = make_manager(
                self._folders, *self._keep, self._timeout, lambda: self._writers
            )
        arrays, index = packing.pack(state, self._rows)
        self._writers = writers_of(arrays)
        self._manager.failed = lambda error: self._report(step, error)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays, custom_metadata=index),
            metadata=ocp.args.JsonSave(dict(metadata)),
        )
        with self._save_errors(step):
            self._executor.submit(self._manager.save, step, args=args, force=True).result()
        saving = self._executor.submit(self._manager.wait_until_finished)
        self._saving = step, saving
        # At once, and not at the next step: this one may wait for a process that waits for ours.
        saving.add_done_callback(lambda done: self._report(step, done.exception()))

    def check(self) -> None:
        """Raises the error of a save that has failed by now; cheap enough to call every step."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          UserError: it failed, or is not done after `timeout_seconds`.
        """
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        with self._save_errors(step):
            try:
                saving.result(self._timeout)
            except concurrent.futures.TimeoutError as error:
                if saving.done():  # a time-out of Orbax itself, when a process does not finish
                    raise
                self._manager = None
                raise UserError(
                    f"expected checkpoint {step} on disk within {self._timeout:g} s, found it "
                    f"unfinished; look at the file system of {self.folder}"
                ) from error
        self._newest = step

    def go_on_from(self, step: int) -> None:
        """Removes the steps after this one, for a run that takes them again from it."""

        def remove() -> int | None:
            there = self._folders.steps()
            self._folders.remove([number for number in there if number > step])
            return max((number for number in there if number <= step), default=None)

        self._newest = hosts.from_first(f"go on in {self._folders.name}", remove)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """Restores a state onto any mesh and number of processes, and the metadata saved with it.

        Memory holds the restored arrays alone; no other state of this size should be alive.

        Args:
          abstract_state: shapes, types and shardings, `jax.ShapeDtypeStruct`s in the state's tree.
          step: None takes the newest undamaged one, and prints a line if newer ones are damaged.
        Raises:
          UserError: there is none, all are damaged, or it does not fit: the config changed.
        """
        self.wait()
        found, metadata = good_step(self._workdir, step)
        state = restore_state(self.folder / str(found), abstract_state, partial=False)
        self._newest = found
        return state, metadata

    def close(self) -> None:
        """Waits for the last save, which may raise here."""
        self._executor.shutdown(wait=False)
        self.wait()
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(UserError):  # the error that is being raised matters more
            self.close()

    def _prepare(self, step: int, num_bytes: int) -> None:
        """Checks for room on the disk and moves newer steps out of the way; called by process 0."""
        self._folders.remove_partials()  # of a run that was killed; they take the room
        self._folders.make(num_bytes)
        oldest = -1 if self._newest is None else self._newest
        self._folders.set_aside([number for number in self._folders.steps() if number > oldest])

    def _report(self, step: int, error: BaseException | None) -> None:
        """Tells the other processes of a save that failed on this one."""
        if error is not None and not watch.is_of_another(error):
            watch.report(self._fault(step, error))

    def _fault(self, step: int, error: BaseException) -> UserError:
        if isinstance(error, UserError):
            return error
        reason, fix = _reason(error), "free some space or repair the disk"
        if scheme_of(self.folder):
            _, reason, fix, _ = fault_of(error)
        return UserError(
            f"could not write checkpoint {step} in {self.folder}: {reason}; {fix}; the older "
            "checkpoints are as they were, and the same command goes on from them"
        )

    @contextlib.contextmanager
    def _save_errors(self, step: int) -> Iterator[None]:
        """Turns Orbax's error for a failed save into a UserError, and removes the partial files."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._manager = None  # it would raise the same error again
            if jax.process_index() == 0:
                self._folders.remove_partials()
            raise self._fault(step, error) from error


def _reason(error: BaseException) -> str:
    """Shortens an error of Orbax or TensorStore, which can be pages long, to one line."""
    full = ("No space left", "Disk quota exceeded", "File too large")
    if any(words in str(error) for words in full):
        return "the disk is full"
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


# ------------------------------------------------------------------ config.json of a run
_METADATA = {  # types of its parts
    "dit": dict, "edm": dict, "has_ema": bool, "vae": str, "text_encoder": str, "attribution": str,
    "config": dict, "config.data": dict, "config.data.vae": str, "config.data.text_encoder": str,
    "config.data.resolution": int, "config.data.heldout": dict, "config.data.heldout.source": str,
    "config.ema": dict, "config.ema.snapshot_every": int, "config.loss": dict,
    "config.loss.learned_uncertainty": bool,
}  # fmt: skip


def is_run(folder: str | os.PathLike) -> bool:
    """Returns True if the folder is the workdir of a training run."""
    if scheme_of(folder):
        about = Bucket(folder).stat("config.json")
        return about is not None and is_run(local_records(folder))
    config = Path(folder) / "config.json"
    return config.is_file() and read_json(config).get("format") == RUN_FORMAT


def write_run_metadata(workdir: str | os.PathLike, metadata: dict) -> None:
    """Writes a run's config.json, which is all that others need to use its checkpoints."""
    write_json(Path(workdir) / "config.json", {"format": RUN_FORMAT, "version": VERSION} | metadata)


def read_run_metadata(workdir: str | os.PathLike, *needed: str) -> dict:
    """Reads config.json of a training run, which may be a stranger's.

    Args:
      needed: parts that must be there, such as "dit" or "config.data.vae".
    Raises:
      UserError: there is none, or its parts are missing or of other types than runs write.
    """
    if not is_run(workdir):
        raise UserError(f"expected the workdir of a training run at {visible(workdir)}, found none")
    path = Path(workdir) / "config.json"
    metadata = read_json(path)
    for name, kind in _METADATA.items():
        part: Any = metadata
        for key in name.split("."):
            part = part.get(key) if isinstance(part, dict) else None
        if part is None and name not in needed:
            continue
        if not isinstance(part, kind):
            raise UserError(
                f"expected {name} in {visible(path)} of type {kind.__name__}, found "
                f"{visible(repr(part), 60)}; copy the run again"
            )
    return metadata


def guidance_scale_of(metadata: dict) -> float | None:
    """Returns the guidance scale that a run's own evaluations sample with, None if it has none."""
    settings = metadata["config"].get("eval")
    scale = settings.get("guidance_scale") if isinstance(settings, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 <= scale < 1e30:
        return None
    return float(scale)


def stages_of(workdir: str | os.PathLike) -> list[str | os.PathLike]:
    """Returns the runs in the folder of a chain of stages, each after the one it starts from.

    A run's own workdir is returned as it is, and so is anything else, for others to refuse.
    """
    if scheme_of(workdir) or not os.path.isdir(workdir) or is_run(workdir):
        return [workdir]
    runs = {folder.name: folder for folder in sorted(Path(workdir).iterdir()) if is_run(folder)}
    before = {}  # by name, the stage that a stage starts from
    for name, folder in runs.items():
        config = read_run_metadata(folder).get("config", {})
        source = config.get("init_from") or config.get("init_weights_from") or ""
        before[name] = os.path.basename(os.path.normpath(str(source)))

    def depth(name: str) -> int:
        seen: set[str] = set()
        while name in before and name not in seen:
            seen.add(name)
            name = before[name]
        return len(seen)

    return [runs[name] for name in sorted(runs, key=depth)] or [workdir]
