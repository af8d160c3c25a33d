"""Writes that are whole or not there.

A file or folder takes its name only when it is complete, so a killed process or a full disk leaves
what was there before. Names that end in ".partial" are unfinished work and may be deleted.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from microdit_jax.errors import UserError
from microdit_jax.files.bucket import FIRST_SECONDS, Bucket
from microdit_jax.files.urls import as_given, check_local, scheme_of


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike, num_bytes: int = 0) -> Iterator[None]:
    """Turns any failure to write `path` into a UserError with the path, the reason and the fix.

    Args:
      num_bytes: how much will be written; refused at once when the disk has less free.
    Raises:
      UserError: such a failure, or `path` is a URL.
    """
    check_local(path)
    try:
        folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise UserError(
                f"{path} needs {num_bytes / 1e9:.2f} GB, found {free / 1e9:.2f} GB free on its "
                "disk; free some space or choose another place"
            )
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = (
            "free some space or choose another place" if full else "choose a place you may write to"
        )
        reason = error.strerror or f"{type(error).__name__}: {error}"
        raise UserError(f"could not write {path}: {reason}; {fix}") from error


def check_writable(path: str | os.PathLike, *, folder: bool = False) -> None:
    """Tries whether `path` can be written, and leaves nothing behind: call it before the work.

    Args:
      folder: True for a folder that files will be put into, False for a file.
    Raises:
      UserError: a file where a folder is needed or the reverse, a loop of links, a place that may
        not be written; a bucket that is not there, or may not be written.
    """
    if scheme_of(path):
        url = as_given(path).rstrip("/")
        Bucket(url if folder else url.rpartition("/")[0], seconds=FIRST_SECONDS).check_writable()
        return
    with disk_errors(path):
        place = Path(path).absolute()
        if not folder:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISDIR(place.stat().st_mode):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            place = place.parent  # a link is replaced by the file, wherever it led
        while True:
            try:
                place.stat()
                break
            except FileNotFoundError:
                if place.is_symlink():
                    raise  # a link to nothing
                place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass


def _partial_of(path: Path) -> Path:
    """An unfinished file's name, of this write alone: several hosts may write the same path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike, num_bytes: int = 0, *, replace: bool = True, mode: int = 0o666
) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes the name `path` once it is complete and on disk.

    Args:
      num_bytes: how much will be written; refused at once when the disk has less.
      replace: as `atomic_path` takes it.
      mode: who may read it from its first moment on, less what the umask forbids.
    Raises:
      UserError: the disk is full or may not be written; nothing is left behind.
    """
    with atomic_path(path, num_bytes, replace=replace) as partial:
        partial.touch(mode)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_path(
    path: str | os.PathLike, num_bytes: int = 0, *, replace: bool = True
) -> Iterator[Path]:
    """A path for a library to write a file at, which is named `path` when the block ends well.

    Args:
      replace: if false, a file that is there by then stays, and the new one is dropped.
    """
    path = Path(path)
    partial = _partial_of(path)
    with disk_errors(path, num_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            if replace or not _link(partial, path):
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(
    folder: str | os.PathLike, num_bytes: int = 0, *, keep: Callable[[], bool] | None = None
) -> Iterator[Path]:
    """Gives a new folder to fill, which is named `folder` when the block ends well.

    The unfinished folder has one fixed name, so the next run removes what a killed one left; only
    one process at a time may write it, and `folder` itself must not exist.

    Args:
      num_bytes: how much will be written; refused at once when the disk has less free.
      keep: allows several processes to write the same folder, each under a name of its own, and
        `folder` to exist. Called at the end: if true, what is there stays and the new one is
        dropped, else the new one replaces it.
    """
    folder = Path(folder)
    fixed = folder.with_name(f".{folder.name}.partial")
    partial = fixed if keep is None else _partial_of(folder)
    with disk_errors(folder, num_bytes):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            if keep is None:
                partial.rename(folder)
            elif not keep():
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_bytes(
    path: str | os.PathLike, data: bytes, *, replace: bool = True, mode: int = 0o666
) -> None:
    """Writes a file whole or not at all; `replace` and `mode` as `atomic_file` takes them."""
    with atomic_file(path, len(data), replace=replace, mode=mode) as file:
        file.write(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, contents: Mapping[str, Any]) -> None:
    """Writes indented JSON, whole or not at all."""
    write_text(path, json.dumps(contents, indent=1, ensure_ascii=False) + "\n")


def _link(partial: Path, path: Path) -> bool:
    """Names a file unless the name is taken; False on disks without hard links."""
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True
