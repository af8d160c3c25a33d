"""Members of tar, tgz and zip archives and of unpacked folders, in order, whatever their state.

A member that cannot be read is one member with a reason; nothing vanishes without one.
"""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from microdit_jax.files.image_files import MAX_BYTES
from microdit_jax.prepare.sources.listed_images import SUFFIXES, read_below
from microdit_jax.prepare.sources.tar_stream import tar_members
from microdit_jax.prepare.sources.zip_file import ZipArchive

# What tarfile, zipfile and zlib raise for a stranger's file
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(ValueError, LookupError, ArithmeticError, RuntimeError, MemoryError),
)
MAX_TEXT = 16 << 20  # bytes of a caption in a .txt or .json file


class Member(NamedTuple):
    """A file of an archive, or the reason why there is none.

    Attributes:
      data: its bytes; b"" for files that are neither images nor texts, which are not read.
    """

    name: str
    data: bytes
    reason: str | None = None


def suffix_of(name: str) -> str:
    """Returns what follows the first dot of a file's name, in lower case: ".jpg"."""
    return f".{PurePosixPath(name).name.partition('.')[2].lower()}"


def members(path: Path) -> Iterator[Member]:
    """Yields the files of an archive or folder, in stored order (a folder's sorted).

    A damaged archive gives what can be read, then one member with the reason.
    """
    try:
        if path.is_dir():
            yield from _folder(path)
        elif path.suffix == ".zip":
            yield from _zip(path)
        else:
            yield from _tar(path)
    except DAMAGE as error:
        yield Member("", b"", f"archive damaged or cut off ({type(error).__name__})")


def read_member(path: Path, name: str, num_bytes: int) -> bytes:
    """Returns the contents of one file of a zip archive or folder, in whatever folder of the zip.

    Raises:
      LookupError: there is none.
      ValueError: it cannot be read; the message is a short reason.
      Exception: one of DAMAGE.
    """
    if path.is_dir():
        return read_below(path, name, num_bytes)
    with ZipArchive(path) as archive:
        for info in archive:
            if PurePosixPath(info.filename).name == name:
                return archive.read(info, num_bytes)
    raise LookupError(name)


def _most_bytes(name: str) -> int | None:
    """Returns how large a file may be; None for one that is not needed."""
    suffix = suffix_of(name)
    return MAX_BYTES if suffix in SUFFIXES else MAX_TEXT if suffix in (".txt", ".json") else None


def _folder(path: Path) -> Iterator[Member]:
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.is_dir():
            most = _most_bytes(name)
            try:
                yield Member(name, b"" if most is None else read_below(path, name, most))
            except ValueError as error:
                yield Member(name, b"", str(error))
            except OSError as error:
                yield Member(name, b"", f"cannot be read ({error.strerror})")


def _zip(path: Path) -> Iterator[Member]:
    with ZipArchive(path) as archive:
        for info in archive:
            most = _most_bytes(info.filename)
            try:
                yield Member(info.filename, b"" if most is None else archive.read(info, most))
            except ValueError as error:
                yield Member(info.filename, b"", str(error))


def _tar(path: Path) -> Iterator[Member]:
    for member in tar_members(path):
        most = _most_bytes(member.name)
        if member.kind == "other" or most is None:
            continue
        if member.kind != "file":  # a link, or a file with holes
            yield Member(member.name, b"", f"a {member.kind} in an archive, which is not read")
        elif member.size > most:
            yield Member(member.name, b"", f"a file of {member.size} bytes")
        else:
            yield Member(member.name, member.file.read(member.size))
