"""The folder of a run's steps, on a disk or in a bucket: which are whole, and which damaged.

On a disk Orbax renames a step's folder when all of it is there. A bucket has no rename: Orbax
writes to the step's own folder, and a file commit_success.txt last.
"""

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from etils import epath

from microdit_jax.checkpoints import bucket_calls
from microdit_jax.errors import LONGEST, UserError, visible
from microdit_jax.files import checksums, damage, disk_errors, parse_json, read_json, write_json
from microdit_jax.files.attempts import BucketError, say
from microdit_jax.files.bucket import Bucket
from microdit_jax.files.integrity import is_checksum
from microdit_jax.files.urls import as_given, scheme_of

STEP = re.compile("[0-9]{1,18}")  # name of a step's folder
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"  # folders of steps in a workdir
MANIFEST, COMMITTED = "manifest.json", "commit_success.txt"
_NOTE = "_CHECKPOINT_METADATA"  # Orbax adds the commit's time to it, and restoring does not read it


@runtime_checkable
class StepFolders(Protocol):
    """The steps of a run.

    Attributes:
      name: path or URL of the folder of steps, for messages.
    """

    name: str

    @property
    def path(self) -> Path | epath.Path:
        """The folder as Orbax takes it."""
        ...

    def steps(self) -> list[int]:
        """Returns the steps that were written whole, oldest first; not checked for damage."""
        ...

    def fault(self, step: int) -> str:
        """Says in words which files of a step are damaged, "" if none; reads every byte."""
        ...

    def metadata(self, step: int) -> dict[str, Any]:
        """Reads what was saved beside a step's state."""
        ...

    def seal(self, writers: set[int]) -> None:
        """Writes the manifest of the one step that is not whole yet.

        Args:
          writers: the processes whose part must be there.
        Raises:
          UserError: a part is missing.
        """
        ...

    def remove_partials(self) -> None:
        """Removes the steps that are not whole."""
        ...

    def make(self, num_bytes: int) -> None:
        """Makes the folder, if it is not there, with room for a step of so many bytes."""
        ...

    def set_aside(self, steps: list[int]) -> None:
        """Moves steps out of the way, to the folder damaged/ of the run."""
        ...

    def remove(self, steps: list[int]) -> None:
        """Removes steps for good."""
        ...


def steps_of(workdir: str | os.PathLike, folder: str = CHECKPOINTS) -> StepFolders:
    """Returns the steps in a folder of a run; on a bucket only gs:// can be written by Orbax."""
    return BucketSteps(workdir, folder) if scheme_of(workdir) else DiskSteps(workdir, folder)


class DiskSteps:
    """Steps on a disk."""

    def __init__(self, workdir: str | os.PathLike, folder: str):
        self._workdir = Path(workdir).absolute()
        self._folder = self._workdir / folder
        self.name = str(self._folder)

    @property
    def path(self) -> Path:
        """The folder as Orbax takes it."""
        return self._folder

    def steps(self) -> list[int]:
        """Returns the steps that were written whole, oldest first; not checked for damage."""
        return sorted(int(path.name) for path in self.path.glob("*") if STEP.fullmatch(path.name))

    def fault(self, step: int) -> str:
        """Says in words which files of a step are damaged, "" if none; reads every byte."""
        return step_damage(self.path / str(step))

    def metadata(self, step: int) -> dict[str, Any]:
        """Reads what was saved beside a step's state."""
        return read_json(self.path / str(step) / "metadata" / "metadata")

    def seal(self, writers: set[int]) -> None:
        """Writes the manifest of the one step that is not whole yet."""
        (partial,) = self._partials()
        for number in sorted(writers):
            if not (partial / "state" / f"ocdbt.process_{number}").is_dir():
                raise _part_is_missing(str(partial), number)
        files = checksums(partial)
        del files[_NOTE]
        write_json(partial / MANIFEST, {"files": files})

    def remove_partials(self) -> None:
        """Removes the steps that are not whole."""
        for _ in range(20):  # other files of the failed save may still be arriving
            for partial in self._partials():
                shutil.rmtree(partial, ignore_errors=True)
            if not self._partials():
                return
            time.sleep(0.1)

    def make(self, num_bytes: int) -> None:
        """Makes the folder, if it is not there, with room for a step of so many bytes."""
        with disk_errors(self.path, num_bytes):
            self.path.mkdir(parents=True, exist_ok=True)

    def set_aside(self, steps: list[int]) -> None:
        """Moves steps out of the way, to the folder damaged/ of the run."""
        with disk_errors(self.path):
            aside = self._workdir / "damaged"
            if steps:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
            for number in steps:
                (self.path / str(number)).rename(aside / str(number))
                say(f"moved checkpoint {number} to {aside / str(number)}; it may be deleted")

    def remove(self, steps: list[int]) -> None:
        """Removes steps for good."""
        with disk_errors(self.path):
            for number in steps:
                (self.path / str(number) / MANIFEST).unlink(missing_ok=True)  # none is half there
                shutil.rmtree(self.path / str(number))

    def _partials(self) -> list[Path]:
        return list(self.path.glob("*.orbax-checkpoint-tmp*"))


class BucketSteps:
    """Steps in a bucket: one is whole when commit_success.txt is there, which comes last."""

    def __init__(self, workdir: str | os.PathLike, folder: str):
        bucket_calls.try_again()
        self._bucket = Bucket(f"{as_given(workdir).rstrip('/')}/{folder}")
        self.name = self._bucket.url

    @property
    def path(self) -> epath.Path:
        """The folder as Orbax takes it."""
        return epath.Path(self.name)

    def steps(self) -> list[int]:
        """Returns the steps that were written whole, oldest first; not checked for damage."""
        return sorted(s for s, whole in self._all().items() if whole)

    def fault(self, step: int) -> str:
        """Says in words which files of a step are damaged, "" if none; reads every byte."""
        folder = self._bucket / str(step)
        try:
            files = parse_json(folder.read(MANIFEST))["files"]
            if not files or not all(map(is_checksum, files.values())):
                raise ValueError("no checksums")
        except BucketError as error:
            if error.kind != "missing":
                raise
            return f"{MANIFEST} is missing"
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"{MANIFEST} is damaged"
        found = folder.objects()
        others = {MANIFEST, COMMITTED, _NOTE}
        faults = [f"{visible(name)} (missing)" for name in files if name not in found]
        faults += [f"{visible(name)} (not listed)" for name in found.keys() - files - others]
        there = [name for name in files if name in found]
        for name, about in zip(there, folder.each(folder.checksum, there), strict=True):
            if list(about) != files[name]:
                faults.append(f"{visible(name)} (changed)")
        more = f" and {len(faults) - 2} more" if len(faults) > 2 else ""
        return ", ".join(faults[:2]) + more

    def metadata(self, step: int) -> dict[str, Any]:
        """Reads what was saved beside a step's state."""
        found = parse_json(self._bucket.read(f"{step}/metadata/metadata"))
        if not isinstance(found, dict):
            raise UserError(f"expected a JSON object in {self.name}/{step}/metadata/metadata")
        return found

    def seal(self, writers: set[int]) -> None:
        """Writes the manifest of the one step that is not whole yet."""
        (partial,) = (str(step) for step, whole in self._all().items() if not whole)
        folder = self._bucket / partial
        found = [name for name in folder.objects() if name not in (_NOTE, MANIFEST)]
        for number in sorted(writers):
            if not any(name.startswith(f"state/ocdbt.process_{number}/") for name in found):
                raise _part_is_missing(folder.url, number)
        sums = folder.each(folder.checksum, found)
        write = {"files": {name: list(about) for name, about in zip(found, sums, strict=True)}}
        folder.write_json(MANIFEST, write)

    def remove_partials(self) -> None:
        """Removes the steps that are not whole."""
        for step, whole in self._all().items():
            if not whole:
                folder = self._bucket / str(step)
                folder.remove(folder.objects())

    def make(self, num_bytes: int) -> None:
        """Does nothing: a bucket has no folders, and no end."""

    def set_aside(self, steps: list[int]) -> None:
        """Removes steps, so that they are written anew: a bucket has no rename."""
        self.remove(steps)
        for number in steps:
            say(f"checkpoint {number} in {self.name} is damaged; removed")

    def remove(self, steps: list[int]) -> None:
        """Removes steps for good."""
        for number in steps:
            (self._bucket / str(number)).remove([COMMITTED])
        self.remove_partials()

    def _all(self) -> dict[int, bool]:
        """Returns the steps, and whether each is whole."""
        steps = [name for name in self._bucket.entries() if STEP.fullmatch(name)]
        whole = self._bucket.each(lambda name: self._bucket.stat(f"{name}/{COMMITTED}"), steps)
        return {int(name): about is not None for name, about in zip(steps, whole, strict=True)}


def step_damage(folder: Path) -> str:
    """Says in words which files of a step on a disk are damaged, "" if none; reads every byte."""
    if folder.is_symlink():
        return "a link to another folder"
    try:
        files = read_json(folder / MANIFEST).get("files")
        faults = damage(folder, files, complete=("state", "metadata"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, OSError):
        return f"{MANIFEST} is damaged"
    more = f" and {len(faults) - 2} more" if len(faults) > 2 else ""
    return ", ".join(faults[:2]) + more


def _part_is_missing(folder: str, process: int) -> UserError:
    return UserError(
        f"expected a part of each process in {visible(folder, LONGEST)}, found none of process "
        f"{process}; mount the same disk on every host"
    )
