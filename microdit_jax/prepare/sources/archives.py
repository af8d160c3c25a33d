"""Members of tar, tgz and zip archives and of unpacked folders, in order, whatever their state."""

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# A member's bytes are held in memory; no usable image file is larger.
_MAX_BYTES = 500 * 10**6
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError)


class Member(NamedTuple):
    """A file of an archive, or the reason why there is none."""

    name: str
    data: bytes
    reason: str | None = None


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
    except _DAMAGE as error:
        yield Member("", b"", f"archive damaged or cut off ({type(error).__name__})")
    except RuntimeError:  # zipfile's, for members that are encrypted
        yield Member("", b"", "archive encrypted")


def _folder(path: Path) -> Iterator[Member]:
    for file in sorted(path.rglob("*")):
        if file.is_file():
            yield _bounded(file.relative_to(path).as_posix(), file.stat().st_size, file.read_bytes)


def _zip(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield _bounded(info.filename, info.file_size, lambda info=info: archive.read(info))


def _tar(path: Path) -> Iterator[Member]:
    with tarfile.open(path, "r|*") as archive:  # a stream: a tgz is unpacked once, not for each
        for info in archive:
            data = archive.extractfile(info) if info.isfile() else None
            if data is not None:
                yield _bounded(info.name, info.size, data.read)
                # Otherwise tarfile keeps a record of every member; its stub lacks the attribute
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]


def _bounded(name: str, size: int, read: Callable[[], bytes]) -> Member:
    if size > _MAX_BYTES:
        return Member(name, b"", f"a file of {size} bytes")
    data = read()
    if len(data) != size:
        raise EOFError
    return Member(name, data)
