"""Readers of archives and tables of captions."""

import itertools
from pathlib import Path

from fuzz.grammar import after_a_byte, json_lines
from fuzz.scratch import Scratch
from fuzz.targets import Read, Target
from microdit_jax.errors import UserError
from microdit_jax.prepare.sources import archives, tables

# A reader of archives counts damage and goes on: it raises nothing.
NOTHING: tuple[type[Exception], ...] = ()


def _members(path: Path) -> None:
    for member in itertools.islice(archives.members(path), 100):
        assert isinstance(member.data, bytes) and isinstance(member.name, str)


def _open_tar(scratch: Scratch) -> Read:
    return lambda data: _members(scratch.file("x.tar", data))


def _open_zip(scratch: Scratch) -> Read:
    return lambda data: _members(scratch.file("x.zip", data))


def _open_table(scratch: Scratch) -> Read:
    def read(data: bytes) -> None:
        # The first byte chooses the format, as a file's name would.
        ending = (".csv", ".tsv", ".jsonl", ".json")[data[0] % 4] if data else ".csv"
        for row in itertools.islice(tables.rows(scratch.file(f"x{ending}", data[1:])), 100):
            assert isinstance(row, dict)

    return read


TARGETS = {
    "tar": Target(
        _open_tar, NOTHING, (b"ustar\x0000", b"ustar  \0", b"path=", b"size=", b"K", b"x")
    ),
    "zip": Target(
        _open_zip, NOTHING, (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"\1\0\x18\0", b"\x0c\0")
    ),
    "table": Target(
        _open_table,
        (UserError, OSError),
        (b'{"', b'"caption":', b"[{", b"\\ud800", b'""'),
        after_a_byte(json_lines),
    ),
}
