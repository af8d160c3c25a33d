"""Members of zip archives, none of which takes more memory than it says and may say."""

import bz2
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from microdit_jax.files import open_regular

_MAX_DIRECTORY = 64 << 20  # bytes of the list of members: a million of them
_ENCRYPTED = 1  # of a member's flags


class _Bounded:
    """A file that `zipfile` reads the list of members from: no header makes it read more."""

    def __init__(self, file: io.BufferedReader):
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, _MAX_DIRECTORY + 1) if size >= 0 else _MAX_DIRECTORY + 1)
        if len(data) > _MAX_DIRECTORY:
            raise zipfile.BadZipFile("a list of members of more than 64 MB")
        return data


class ZipArchive:
    """An open zip archive; a context manager.

    `zipfile` itself unpacks a bzip2 member whole, whatever size the archive gives for it.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads the list of members.

        Raises:
          Exception: no zip, or a damaged one; `zipfile` raises whatever it meets.
          UserError: no regular file.
        """
        self._file = open_regular(path)
        try:
            with zipfile.ZipFile(cast(BinaryIO, _Bounded(self._file))) as archive:
                self._members = archive.infolist()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ZipArchive":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[zipfile.ZipInfo]:
        """Yields the files, without the folders, in stored order."""
        return (info for info in self._members if not info.is_dir())

    def read(self, info: zipfile.ZipInfo, num_bytes: int) -> bytes:
        """Returns the contents of a member of at most `num_bytes` bytes.

        Raises:
          ValueError: it is larger, encrypted, damaged, or packed by an unknown method; the message
            is a short reason.
          OSError: the file cannot be read.
        """
        size = info.file_size
        if max(size, info.compress_size) > num_bytes:
            raise ValueError(f"a file of {max(size, info.compress_size)} bytes")
        if info.flag_bits & _ENCRYPTED:
            raise ValueError("encrypted")
        self._file.seek(info.header_offset)
        header = self._file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise ValueError("damaged")
        self._file.seek(sum(struct.unpack("<2H", header[26:])), os.SEEK_CUR)  # name, extra fields
        packed = self._file.read(info.compress_size)
        try:
            data = _unpack(packed, info.compress_type, size)
        except (zlib.error, OSError, EOFError) as error:
            raise ValueError("damaged") from error
        if len(data) != size or zlib.crc32(data) != info.CRC:
            raise ValueError("damaged")
        return data


def _unpack(packed: bytes, method: int, size: int) -> bytes:
    """Unpacks at most one byte more than `size`."""
    if method == zipfile.ZIP_STORED:
        return packed
    if method == zipfile.ZIP_DEFLATED:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
    if method == zipfile.ZIP_BZIP2:
        return bz2.BZ2Decompressor().decompress(packed, size + 1)
    raise ValueError(f"packed by a method ({method}) that is not read; use stored or deflated")
