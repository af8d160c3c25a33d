"""Members of an uncompressed zip as slices of the mapped file, and their checksums.

The directory at the end of the file is read by itself (APPNOTE.TXT, PKWARE), with nothing allocated
on the word of a header: a member is bytes of the file, so it is never larger than the file.
"""

import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from microdit_jax.convert.formats.file_bytes import map_bytes
from microdit_jax.errors import UserError, visible

_END = struct.Struct("<4s4H2IH")  # of the directory: PK 5 6, disks, entries, size, offset, comment
_END64_AT = struct.Struct("<4sIQI")  # PK 6 7, disk, offset, disks
_END64 = struct.Struct("<4sQ2H2I4Q")  # PK 6 6, size, versions, disks, entries, size, offset
_ENTRY = struct.Struct("<4s6H3I5H2I")  # PK 1 2, ..., attributes, offset of the local header
_LOCAL = struct.Struct("<4s5H3I2H")  # PK 3 4, version, flags, method, time, date, crc, sizes, ...
MAX_MEMBERS = 1_000_000
_LATER = 8  # flag: sizes and checksum stand after the member, zeros before it
_ENCRYPTED = 1
_IN_EXTRA = 0xFFFFFFFF  # the number stands in the ZIP64 field


class NotAZipError(ValueError):
    """The file does not end with a zip's directory."""


class _Member(NamedTuple):
    header: int  # offset of the local header
    start: int  # offset of the bytes
    size: int
    crc: int
    is_plain: bool  # neither compressed nor encrypted


class ZipMembers:
    """Opens a zip.

    Args:
      data: bytes of the zip, where it is only a part of the file.

    Attributes:
      has_checksums: False if the zip was written without them: torch.save does so when asked to.
    Raises:
      NotAZipError: the directory is missing.
      UserError: the directory does not fit the members, or there is no such file.
    """

    def __init__(self, path: Path, data: UInt8[np.ndarray, " b"] | None = None):
        self.path, self.data = path, map_bytes(path) if data is None else data
        self._members: dict[str, _Member] = {}
        self._good: set[str] = set()  # whose checksums were found right
        try:
            self._read_directory()
        except struct.error as error:
            raise self._damaged("a directory that ends too early") from error
        self.has_checksums = any(member.crc for member in self._members.values())

    def names(self) -> list[str]:
        """Names of all members, in the directory's order."""
        return list(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> UInt8[np.ndarray, " b"]:
        """The bytes of a member, a view of the mapped file; KeyError if there is none."""
        member = self._members[name]
        if not member.is_plain:
            raise UserError(
                f"expected uncompressed members in {visible(self.path)}, found {visible(name)} "
                "compressed or encrypted; re-save it with torch.save"
            )
        return self.data[member.start : member.start + member.size]

    def verify(self, names: Iterable[str]) -> None:
        """Computes the checksums (crc32) of members that were not verified before, in threads.

        Raises:
          UserError: a member's bytes are not those that were written.
        """
        todo = sorted(set(names) - self._good, key=lambda name: self._members[name].start)
        if not self.has_checksums or not todo:
            return
        if sum(self._members[name].size for name in todo) < 1 << 20:
            found = [zlib.crc32(self[name].data) for name in todo]
        else:
            with ThreadPoolExecutor() as pool:
                found = list(pool.map(lambda name: zlib.crc32(self[name].data), todo))
        for name, crc in zip(todo, found, strict=True):
            if crc != self._members[name].crc:
                raise self._damaged(f"other bytes in {visible(name)} than its checksum is of")
        self._good.update(todo)

    def _damaged(self, found: str) -> UserError:
        return UserError(
            f"expected a whole zip at {visible(self.path)}, found {found}; fetch it again"
        )

    def _unpack(self, layout: struct.Struct, offset: int) -> tuple:
        if offset < 0:
            raise self._damaged("an offset before the file's start")
        return layout.unpack(self.data[offset : offset + layout.size].tobytes())

    def _find_directory(self) -> tuple[int, int, int]:
        """Number of entries, and the directory's start and end."""
        tail = max(0, len(self.data) - _END.size - 0xFFFF)
        at = self.data[tail:].tobytes().rfind(b"PK\x05\x06")
        if at < 0 or tail + at + _END.size > len(self.data):
            raise NotAZipError(self.path)
        at += tail
        *_, count, size, start, comment = self._unpack(_END, at)
        if at + _END.size + comment != len(self.data):
            raise NotAZipError(self.path)
        end = at
        if 0xFFFF == count or _IN_EXTRA in (size, start):
            magic, _, end, _ = self._unpack(_END64_AT, at - _END64_AT.size)
            if magic != b"PK\x06\x07":
                raise self._damaged("no end of its directory")
            magic, *_, count, size, start = self._unpack(_END64, end)
            if magic != b"PK\x06\x06":
                raise self._damaged("no end of its directory")
        if start + size > end or count * _ENTRY.size > size or count > MAX_MEMBERS:
            raise self._damaged(f"a directory of {count:,} members in {size:,} bytes")
        return count, start, start + size

    def _read_directory(self) -> None:
        count, start, end = self._find_directory()
        position = start
        for _ in range(count):
            fields = self._unpack(_ENTRY, position)
            magic, flags, method, crc, packed, size = (fields[i] for i in (0, 3, 4, 7, 8, 9))
            name_size, extra_size, comment_size, offset = (fields[i] for i in (10, 11, 12, 16))
            position += _ENTRY.size
            after = position + name_size + extra_size + comment_size
            if magic != b"PK\x01\x02" or after > end:
                raise self._damaged("a damaged directory")
            raw = self.data[position : position + name_size].tobytes()
            extra = self.data[position + name_size :][:extra_size].tobytes()
            size, packed, offset = _large(extra, [size, packed, offset])
            member = self._member(raw, flags, method, crc, packed, size, offset)
            name = raw.decode(errors="backslashreplace")
            if name in self._members:
                raise self._damaged(f"{visible(name)} twice")
            self._members[name] = member
            position = after
        reached = 0
        for name, member in sorted(self._members.items(), key=lambda item: item[1].header):
            if member.header < reached:
                raise self._damaged(f"{visible(name)} within another member")
            reached = member.start + member.size
        if reached > start:
            raise self._damaged("members that reach into its directory")

    def _member(
        self, raw: bytes, flags: int, method: int, crc: int, packed: int, size: int, offset: int
    ) -> _Member:
        """The member of an entry, which the header before the bytes must agree with."""
        # The local header repeats the name and has an extra field of its own (torch pads with it),
        # so only the header itself tells where the bytes begin.
        fields = self._unpack(_LOCAL, offset)
        magic, _, local_flags, local_method, _, _, *numbers, name_size, extra_size = fields
        start = offset + _LOCAL.size + name_size + extra_size
        name = self.data[offset + _LOCAL.size :][:name_size].tobytes()
        local_crc, *sizes = numbers
        if _IN_EXTRA in sizes:
            extra = self.data[offset + _LOCAL.size + name_size :][:extra_size].tobytes()
            sizes = _large(extra, sizes[::-1])[::-1]
        agrees = [local_crc, *sizes] == [crc, packed, size]
        if flags & local_flags & _LATER:
            agrees = agrees or not any([local_crc, *sizes])
        if magic != b"PK\x03\x04" or name != raw or local_method != method or not agrees:
            raise self._damaged(f"another header before {visible(raw)} than in its directory")
        is_plain = method == 0 and not flags & _ENCRYPTED
        if is_plain and packed != size:
            raise self._damaged(f"{visible(raw)} with two sizes")
        return _Member(offset, start, packed, crc, is_plain)


def _large(extra: bytes, numbers: list[int]) -> list[int]:
    """Replaces numbers of 0xFFFFFFFF by those of the ZIP64 extra field, which has them in order."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            large = iter(struct.unpack(f"<{length // 8}Q", extra[4 : 4 + length // 8 * 8]))
            return [next(large, n) if n == _IN_EXTRA else n for n in numbers]
        extra = extra[4 + length :]
    return numbers
