"""Long jobs that write a folder part by part: same command again goes on, another one is refused.

Any number of processes may work on one folder, each on its own parts; whoever finds all parts done
finishes the job. A part takes its name only once it is whole, so a killed job leaves no half ones.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microdit_jax.errors import UserError, disk_errors

JOB = "job.json"


def begin(folder: Path, request: dict[str, Any]) -> None:
    """Marks the folder as this job's, or checks that it is.

    Args:
      request: all that decides what will be written; JSON values.
    Raises:
      UserError: the folder is another job's, or holds something else.
    """
    path = folder / JOB
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"expected a free place for the output in {folder}, found something else there; "
                "choose another folder"
            ) from None
        write_text(path, json.dumps(request, indent=2, sort_keys=True) + "\n")
        return
    except ValueError as error:
        raise UserError(f"expected a job in {path}, found damage; delete {folder}") from error
    request = json.loads(json.dumps(request))
    if found != request:
        names = sorted(k for k in found.keys() | request if found.get(k) != request.get(k))
        raise UserError(
            f"{folder} was begun with other settings: "
            + ", ".join(f"{k}={found.get(k)!r}, now {request.get(k)!r}" for k in names)
            + "; use those, or choose another folder"
        )


@contextlib.contextmanager
def part(folder: Path) -> Iterator[Path]:
    """A folder to write one part into, which takes its name when the block ends well."""
    partial = folder.with_name(f"{folder.name}.partial")
    with disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also where several processes write the same."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path, len(text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
