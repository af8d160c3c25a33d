"""Every path that is read or written: writes that are whole or not there, checksums, JSON, cache.

A file or folder takes its name only when it is complete, so a killed process or a full disk leaves
what was there before. Names that end in ".partial" are unfinished work and may be deleted.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from microdit_jax.errors import UserError


def cache_folder() -> Path:
    """The user's cache folder of this project: converted checkpoints and compiled programs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "microdit_jax"


def shipped(name: str) -> Path:
    """A file or folder of the checkout's top level that a wheel carries inside the package.

    The installed copy comes first; in a checkout there is none, and the top level's own is used.
    """
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.exists() else package.parent / name


# ------------------------------------------------------------------ writing
@contextlib.contextmanager
def disk_errors(path: str | os.PathLike, num_bytes: int = 0) -> Iterator[None]:
    """Turns any failure to write `path` into a UserError with the path, the reason and the fix.

    Args:
      num_bytes: how much will be written; refused at once when the disk has less free.
    """
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
        not be written.
    """
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
    path: str | os.PathLike, num_bytes: int = 0, *, replace: bool = True
) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes the name `path` once it is complete and on disk.

    Args:
      num_bytes: how much will be written; refused at once when the disk has less.
      replace: as `atomic_path` takes it.
    Raises:
      UserError: the disk is full or may not be written; nothing is left behind.
    """
    with atomic_path(path, num_bytes, replace=replace) as partial, partial.open("wb") as file:
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


def write_bytes(path: str | os.PathLike, data: bytes, *, replace: bool = True) -> None:
    """Writes a file whole or not at all; with `replace` false, a file that is there stays."""
    with atomic_file(path, len(data), replace=replace) as file:
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


# ------------------------------------------------------------------ reading
def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: damaged, or not an object.
    """
    try:
        contents = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(
            f"expected JSON in {path}, found damage ({error}); make or fetch it again"
        ) from error
    if not isinstance(contents, dict):
        raise UserError(
            f"expected a JSON object in {path}, found {type(contents).__name__}; make or fetch it "
            "again"
        )
    return contents


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz; never unpickles.

    Raises:
      OSError: the file cannot be opened.
      ValueError: it is damaged, or no .npz.
    """
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as error:  # damage is raised by zipfile, zlib, the header's parser, ...
            raise ValueError(f"{type(error).__name__}: {error}") from error


# ------------------------------------------------------------------ checksums
def sha256(path: str | os.PathLike) -> str:
    """The file's sha256 in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, list]:
    """Size in bytes and sha256 of every file in the folder and below, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda path: [path.stat().st_size, sha256(path)], files)
        return {
            path.relative_to(folder).as_posix(): found
            for path, found in zip(files, sums, strict=True)
        }


def damage(folder: Path, files: Mapping[str, list]) -> list[str]:
    """Names every file of `checksums` that is missing or has changed, with what is wrong."""

    def fault(name: str) -> str | None:
        path, (size, digest) = folder / name, files[name]
        if not path.is_file():
            return f"{name} (missing)"
        if path.stat().st_size != size:
            return f"{name} ({path.stat().st_size} bytes instead of {size})"
        return None if sha256(path) == digest else f"{name} (contents changed)"

    with ThreadPoolExecutor() as pool:
        return [fault for fault in pool.map(fault, files) if fault]
