"""Converts other libraries' checkpoints once, into the user's cache folder."""

import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import jax

from microdit_jax.checkpoints import model_folder
from microdit_jax.convert.inputs import find_input
from microdit_jax.convert.kinds import get_kind
from microdit_jax.convert.to_folder import convert_to_folder
from microdit_jax.errors import UserError
from microdit_jax.files import HeldFolder, cache_folder, disk_errors


def converted(
    kind: str, path: Path, given: Mapping[str, Any] | None = None, weights: str | None = None
) -> Path:
    """Converts a PyTorch or safetensors file or folder into the cache, unless it is there already.

    A file is recognised by its path, size and modification time, without being read. A folder that
    was made from an older file at the same path is replaced.

    Args:
      given: values of the kind's options.
      weights: which, if the file holds several; see convert.holdings.choose.
    """
    source = find_input(path, get_kind(kind))
    if missing := [file.name for file in source.files if not file.is_file()]:
        raise UserError(f"expected all files of {path}, found no {', '.join(missing)}; fetch it")
    stats = [(str(file.resolve()), file.stat()) for file in source.files]
    made_from = {
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "config": source.config,
        **({"given": dict(given)} if given else {}),
        **({"weights": weights} if weights else {}),
    }
    chosen: list[Any] = [dict(given)] if given else []
    named = [name for name, _ in stats] + chosen + ([weights] if weights else [])
    key = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{kind}-{source.files[0].stem}-{key}"
    with disk_errors(folder):
        HeldFolder(
            folder.parent.resolve(), own=True
        )  # made, and nobody else's: nothing is planted there
        with filelock.FileLock(f"{folder}.lock"):  # another process may convert the same file
            if folder.is_symlink():
                folder.unlink()
            if folder.is_dir() and not _is_made_from(folder, made_from):
                (folder / "config.json").unlink(missing_ok=True)  # first: then it is no model
                shutil.rmtree(folder)
            if not folder.is_dir():
                print(f"converting {path}, once, into {folder}", flush=True)
                notes = {"cached": made_from}
                _outside_of_job(_convert, kind, path, folder, notes, given, weights)
    return folder


def _convert(
    kind: str,
    path: Path,
    folder: Path,
    notes: dict[str, Any],
    given: Mapping[str, Any] | None,
    weights: str | None,
) -> None:
    options: dict[str, Any] = {"notes": notes, "given": given, "weights": weights}
    convert_to_folder(get_kind(kind), path, folder, **options)


def _is_made_from(folder: Path, made_from: dict[str, Any]) -> bool:
    if not model_folder.is_model(folder):  # a killed process was about to remove it
        return False
    if folder.stat().st_uid != folder.parent.stat().st_uid:  # another user's, from before
        return False
    return model_folder.read_metadata(folder).get("cached") == made_from


def _outside_of_job(function: Callable, *args: Any, **kwargs: Any) -> None:
    """Calls a function; in a process of its own if several processes run one program.

    Orbax saves with all processes of a program, but only one process of each host converts.
    """
    if jax.process_count() == 1:
        function(*args, **kwargs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_leave_accelerators) as pool:
        pool.submit(function, *args, **kwargs).result()


def _leave_accelerators() -> None:
    jax.config.update("jax_platforms", "cpu")  # the parent holds the accelerators
