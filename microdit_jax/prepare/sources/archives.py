"""Members of tar, tgz and zip archives and of unpacked folders, in order, whatever their state.

A member that cannot be read is one member with a reason; nothing vanishes without one.
"""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
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


def _everything(name: str) -> bool:
    return True


def members(path: Path, wants: Callable[[str], bool] = _everything) -> Iterator[Member]:
    """Yields the files of an archive or folder, in stored order (a folder's sorted).

    A damaged archive gives what can be read, then one member with the reason.

    Args:
      wants: tells by a name if the file is to be read; else its data are b"".
    """
    try:
        if path.is_dir():
            yield from _folder(path, wants)
        elif path.suffix == ".zip":
            yield from _zip(path, wants)
        else:
            yield from _tar(path, wants)
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
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in SUFFIXES:
        return MAX_BYTES
    return MAX_TEXT if suffix in (".txt", ".caption", ".json") else None


def _folder(path: Path, wants: Callable[[str], bool]) -> Iterator[Member]:
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.is_dir():
            most = _most_bytes(name) if wants(name) else None
            try:
                yield Member(name, b"" if most is None else read_below(path, name, most))
            except ValueError as error:
                yield Member(name, b"", str(error))
            except OSError as error:
                yield Member(name, b"", f"cannot be read ({error.strerror})")


def _zip(path: Path, wants: Callable[[str], bool]) -> Iterator[Member]:
    with ZipArchive(path) as archive:
        for info in archive:
            most = _most_bytes(info.filename) if wants(info.filename) else None
            try:
                yield Member(info.filename, b"" if most is None else archive.read(info, most))
            except ValueError as error:
                yield Member(info.filename, b"", str(error))


def _tar(path: Path, wants: Callable[[str], bool]) -> Iterator[Member]:
    for member in tar_members(path):
        most = _most_bytes(member.name)
        if member.kind == "other":
            continue
        if most is None:
            yield Member(member.name, b"")
        elif member.kind != "file":  # a link, or a file with holes
            yield Member(member.name, b"", f"a {member.kind} in an archive, which is not read")
        elif member.size > most:
            yield Member(member.name, b"", f"a file of {member.size} bytes")
        else:
            data = member.file.read(member.size) if wants(member.name) else b""
            yield Member(member.name, data)
