"""Members of tar archives as a stream, of which headers decide neither memory nor an early end.

`tarfile` reads a header of any claimed size whole, keeps a record of every member, and takes damage
after the first member for the archive's end. Formats: ustar, GNU and pax, plain or in gzip or
bzip2; names are decoded as UTF-8, what is not shows as its escapes.
"""

import bz2
import gzip
import io
import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from microdit_jax.files import open_regular

_BLOCK = 512
_MAX_HEADER = 1 << 20  # bytes of a long name or of pax records
_FILES, _LINKS, _WITHOUT_DATA = b"0\x007", b"12", b"123456"
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class TarMember(NamedTuple):
    """A member of an archive; `file` gives its bytes until the next member is asked for.

    Attributes:
      kind: "file", "link", "sparse file" (whose holes are not stored) or "other".
    """

    name: str
    kind: str
    size: int
    file: io.BufferedReader


class _Contents(io.RawIOBase):
    """The bytes of one member."""

    def __init__(self, stream: io.BufferedIOBase, size: int):
        self._stream, self.left = stream, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._stream.read(min(len(buffer), self.left))
        if not data and self.left and len(buffer):
            raise tarfile.ReadError("unexpected end of data")
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)


def tar_members(path: str | os.PathLike) -> Iterator[TarMember]:
    """Yields the members of an archive in stored order.

    Raises:
      tarfile.ReadError: no tar, a damaged one, or one that is cut off, after the members before it.
      OSError, EOFError, IndexError, zlib.error: damage of the compressed stream.
      UserError: no regular file.
    """
    with open_regular(path) as file:
        magic = file.peek(3)
        if magic.startswith(b"\x1f\x8b"):
            yield from _members(gzip.GzipFile(fileobj=file))
        elif magic.startswith(b"BZh"):
            yield from _members(bz2.BZ2File(file))
        else:
            yield from _members(file)


def _members(stream: io.BufferedIOBase) -> Iterator[TarMember]:
    name, size, is_sparse = None, None, False
    while True:
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            raise tarfile.ReadError("no end mark")
        if not block.strip(b"\0"):
            if stream.read(1 << 16).strip(b"\0"):
                raise tarfile.ReadError("data after the end mark")
            return
        own_name, kind, own_size = _header(block)
        if kind in b"LKxXg":
            data = _extended(stream, own_size)
            if kind == b"L":
                name = data.rstrip(b"\0")
            elif kind in b"xX":
                records = _pax_records(data)
                name, size = records.get(b"path", name), records.get(b"size", size)
                is_sparse |= any(key.startswith(b"GNU.sparse.") for key in records)
            continue
        size = own_size if size is None else _whole(size)
        shown = (own_name if name is None else name).decode(errors="backslashreplace")
        if kind in _WITHOUT_DATA:
            size = 0
        more = block[482] if kind == b"S" else 0
        while more:  # GNU's further lists of where a sparse file has bytes
            more = stream.read(_BLOCK)[504]
        contents = _Contents(stream, size)
        yield TarMember(
            shown.rstrip("/"),
            _kind(kind, is_sparse, shown),
            size,
            io.BufferedReader(contents, 1 << 16),
        )
        _skip(stream, contents.left + -size % _BLOCK)
        name, size, is_sparse = None, None, False


def _header(block: bytes) -> tuple[bytes, bytes, int]:
    """Parses a header: the member's name, type and size in bytes."""
    around = block[:148] + b" " * 8 + block[156:]
    excess = _number(block[148:156]) - sum(around)
    if excess and excess != -256 * sum(byte > 127 for byte in around):  # a sum of signed bytes
        raise tarfile.ReadError("bad checksum")
    name, kind = block[:100].split(b"\0")[0], block[156:157]
    prefix = block[345:500].split(b"\0")[0]
    if prefix and kind not in b"LKS":
        name = prefix + b"/" + name
    size = _number(block[124:136])
    if size < 0:
        raise tarfile.ReadError("negative size")
    return name, kind, size


def _number(field: bytes) -> int:
    """Parses an octal number, or a binary one as GNU writes large ones."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] > 128 else 0)
    return _whole(field.split(b"\0")[0].strip() or b"0", 8)


def _whole(text: bytes, base: int = 10) -> int:
    if not text.isdigit() or len(text) > 20:
        raise tarfile.ReadError("no number")
    try:
        return int(text, base)
    except ValueError as error:
        raise tarfile.ReadError("no number") from error


def _extended(stream: io.BufferedIOBase, size: int) -> bytes:
    """Reads a long name or pax records, and what fills up their last block."""
    if size > _MAX_HEADER:
        raise tarfile.ReadError(f"a header of {size} bytes")
    data = stream.read(size + -size % _BLOCK)
    if len(data) < size:
        raise tarfile.ReadError("unexpected end of data")
    return data[:size]


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    records, at = {}, 0
    while found := _PAX_RECORD.match(data, at):
        end = at + int(found[1])
        if end <= found.end() or end > len(data):
            raise tarfile.ReadError("bad pax record")
        records[found[2]] = data[found.end() : end - 1]
        at = end
    return records


def _kind(kind: bytes, is_sparse: bool, name: str) -> str:
    if kind == b"S" or is_sparse:
        return "sparse file"
    if kind in _LINKS:
        return "link"
    is_old_folder = kind == b"\0" and name.endswith("/")
    return "file" if kind in _FILES and not is_old_folder else "other"


def _skip(stream: io.BufferedIOBase, count: int) -> None:
    """Passes over bytes; a cut inside of them is noticed at the next header."""
    if isinstance(stream, io.BufferedReader):  # the file itself
        stream.seek(count, os.SEEK_CUR)
        return
    while count and (data := stream.read(min(count, 1 << 20))):
        count -= len(data)
