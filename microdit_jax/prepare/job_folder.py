"""Folder of a long job, written part by part: the same job goes on, another one is refused.

Any number of processes may work on one folder, each on the parts that it claims; a process that
finds all parts done finishes the job. A part takes its name once it is whole, so a kill leaves no
half ones.
"""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from microdit_jax.errors import UserError
from microdit_jax.files import disk_errors, parse_json, read_bytes, write_bytes

JOB = "job.json"


def check_counts(process_index: int, process_count: int, **others: int) -> None:
    """Raises UserError for an impossible process, or another count (by flag name) below 1."""
    for name, count in {"process_count": process_count, **others}.items():
        if count < 1:
            raise UserError(f"--{name} must be at least 1, found {count}")
    if not 0 <= process_index < process_count:
        raise UserError(f"--process_index must be 0 to {process_count - 1}, found {process_index}")


def begin(folder: Path, request: dict[str, Any]) -> None:
    """Marks the folder as this job's, or checks that it is; of several at once, the first decides.

    Args:
      request: everything that decides what will be written; JSON values.
    Raises:
      UserError: the folder is another job's, holds something else, or may not be written.
    """
    path, text = folder / JOB, json.dumps(request, indent=2, sort_keys=True) + "\n"
    with disk_errors(path):
        if not path.exists():
            # Others may begin at the same time, but they write job.json before anything else
            if _content(folder) and not path.exists():
                raise UserError(
                    f"expected a free path for the output in {folder}, found something else "
                    "there; choose another folder"
                )
            write_bytes(path, text.encode(), replace=False)
        stored = read_bytes(path)
    try:
        found, request = parse_json(stored), parse_json(text)
        names = sorted(k for k in found.keys() | request if found.get(k) != request.get(k))
    except (ValueError, AttributeError) as error:
        raise UserError(f"expected a job in {path}, found damage; delete {folder}") from error
    if names:
        finished = not all(name.endswith(".partial") for name in _content(folder))
        raise UserError(
            f"{folder} was begun with other settings: "
            + ", ".join(f"{k}={found.get(k)!r}, now {request.get(k)!r}" for k in names)
            + "; use those, or choose another folder"
            + ("" if finished else "; nothing is finished there: delete it if no process uses it")
        )


def let_go(folder: Path, *names: str) -> None:
    """Removes what binds a folder to a job that has written nothing, and its empty parts.

    Args:
      names: files of the job beside its own; a subfolder with one of them is a part.
    """
    with contextlib.suppress(OSError):  # the failure that led here is what matters
        for part in folder.glob("[0-9]*[0-9]"):
            if any((part / name).is_file() for name in names):
                shutil.rmtree(part)
        for name in (*names, JOB):
            (folder / name).unlink(missing_ok=True)


def _content(folder: Path) -> list[str]:
    """Lists a folder, if it exists, without job.json and half-written copies of it."""
    found = [path.name for path in folder.iterdir()] if folder.exists() else []
    # skipped.jsonl stays of a job that let go
    own = rf"\.{JOB}\..*\.partial|{JOB}|skipped\.jsonl|\.claims"
    return [name for name in found if not re.fullmatch(own, name)]
