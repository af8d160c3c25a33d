"""Checksums of files and folders."""

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from microdit_jax.errors import UserError, visible
from microdit_jax.files.reading import open_regular


def sha256(path: str | os.PathLike) -> str:
    """The file's sha256 in hexadecimal digits; raises UserError for a pipe or a device."""
    with open_regular(path) as file:
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


def damage(folder: Path, files: Any, *, complete: Sequence[str] = ()) -> list[str]:
    """Names every file of `checksums` that is missing, changed or no plain file of this folder.

    Only plain files inside the folder are read: none that a link leads to, no pipe or device.

    Args:
      files: as `checksums` makes it, of any origin.
      complete: files and folders that must be listed with all that is in them.
    Returns:
      Each name with what is wrong, escaped.
    Raises:
      UserError: `files` has another form.
    """
    if not isinstance(files, Mapping) or not all(map(is_checksum, files.values())):
        raise UserError(
            f"expected a size and a sha256 for each file of {visible(folder)}, found something "
            "else in its manifest; copy the folder again"
        )
    root = os.path.realpath(folder)

    def fault(name: str) -> str | None:
        path, (size, digest) = os.path.join(root, name), files[name]
        if os.path.normpath(path) != path or not path.startswith(os.path.join(root, "")):
            return f"{visible(name)} (a name that leads out of the folder)"
        if not os.path.lexists(path):
            return f"{visible(name)} (missing)"
        if os.path.realpath(path) != path or not stat.S_ISREG(os.lstat(path).st_mode):
            return f"{visible(name)} (a link, or no plain file)"
        if os.lstat(path).st_size != size:
            return f"{visible(name)} ({os.lstat(path).st_size} bytes instead of {size})"
        return None if sha256(path) == digest else f"{visible(name)} (contents changed)"

    unlisted = [f"{visible(n)} (not listed)" for n in _contents(folder, complete) if n not in files]
    with ThreadPoolExecutor() as pool:
        return unlisted + [fault for fault in pool.map(fault, files) if fault]


def is_checksum(value: Any) -> bool:
    """Returns True for a size and a sha256 as `checksums` gives them."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and type(value[0]) is int
        and isinstance(value[1], str)
    )


def _contents(folder: Path, names: Sequence[str]) -> list[str]:
    """Lists the files, and the links of any kind, of these parts of a folder, without following."""
    found = []
    for name in names:
        if not (folder / name).is_dir():
            found.append(name)
        for top, folders, files in os.walk(folder / name):
            links = [link for link in folders if os.path.islink(os.path.join(top, link))]
            found += [os.path.relpath(os.path.join(top, file), folder) for file in files + links]
    return found
