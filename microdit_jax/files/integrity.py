"""Checksums of files and folders."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


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
