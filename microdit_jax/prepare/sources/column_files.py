"""Rows of Parquet and Arrow files, group by group, few in memory at a time."""

import hashlib
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq

from microdit_jax.errors import UserError, visible
from microdit_jax.files import open_regular

_BATCH_BYTES = 64 << 20  # of rows that are read at once, by the file's own table of contents
_MAX_BATCH = 256  # rows
_BUFFER = 1 << 20  # bytes that are read of a column at a time
_PARQUET, _ARROW = b"PAR1", b"ARROW1"  # first bytes of files
_MAX_HEADER = 64 << 20  # bytes of one message's description, or a Parquet file's


@runtime_checkable
class ColumnFile(Protocol):
    """A file of rows in groups that can be read alone."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        ...

    @property
    def group_rows(self) -> Sequence[int]:
        """Number of rows of each group."""
        ...

    def describe(self, groups: range) -> str:
        """Returns a text that differs for other contents, without reading them."""
        ...


def open_column_file(path: Path) -> ColumnFile:
    """Opens a file by its first bytes: Parquet, or Arrow as a file or as a stream.

    Raises:
      UserError: it is none of these, or damaged.
    """
    try:
        magic = _magic(path)
        file = _Parquet(path) if magic == _PARQUET else _Arrow(path, is_file=magic == _ARROW)
        _decode_names(file.schema)
        return file
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UserError(
            f"expected a Parquet or Arrow file at {visible(path)}, could not read it "
            f"({visible(error, 200)}); download it again"
        ) from error


class _Parquet:
    """A Parquet file; pages are read as they are needed."""

    def __init__(self, path: Path):
        self._footer = _footer_hash(path)
        with _open_parquet(path) as file:
            self.schema, metadata = file.schema_arrow, file.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            self.group_rows = [group.num_rows for group in groups]
            if min(self.group_rows, default=0) < 0:
                raise ValueError("a negative number of rows")

    def describe(self, groups: range) -> str:
        return f"{groups} {self._footer}"


class _Arrow:
    """An Arrow stream, as Hugging Face writes it, or file; its batches are the groups of rows."""

    def __init__(self, path: Path, *, is_file: bool):
        self.group_rows, self._texts = [], []
        with pa.memory_map(str(path)) as source:
            reader, batches = _batches(source, is_file=is_file)
            self.schema = reader.schema
            for batch in batches:  # mapped: the rows themselves are not read
                self.group_rows.append(batch.num_rows)
                batch.validate()
                self._texts.append(f"{batch.num_rows} {batch.get_total_buffer_size()}")

    def describe(self, groups: range) -> str:
        return _digest(self._texts[i] for i in groups)


# ------------------------------------------------------------------ rows
def read_rows(
    path: Path, groups: range, columns: Sequence[str]
) -> Generator[dict[str, Any], None, None]:
    """Yields the rows of some groups of a file.

    Raises:
      UserError: a path that is no regular file.
      pa.ArrowException, OSError, ValueError, MemoryError: damage.
    """
    magic = _magic(path)
    if magic == _PARQUET:
        yield from _parquet_rows(path, groups, columns)
    else:
        yield from _arrow_rows(path, groups, columns, is_file=magic == _ARROW)


def _magic(path: Path) -> bytes:
    """Returns `_PARQUET`, `_ARROW` or other first bytes of a file."""
    with open_regular(path) as file:
        magic = file.read(len(_ARROW))
    return _PARQUET if magic.startswith(_PARQUET) else magic


def _open_parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(
        path,
        buffer_size=_BUFFER,
        pre_buffer=False,
        page_checksum_verification=True,
        thrift_container_size_limit=10**7,
        thrift_string_size_limit=_MAX_HEADER,
    )


def _parquet_rows(
    path: Path, groups: range, columns: Sequence[str]
) -> Generator[dict[str, Any], None, None]:
    with _open_parquet(path) as file:
        for number in groups:
            group = file.metadata.row_group(number)
            row_bytes = max(group.total_byte_size, 0) // max(group.num_rows, 1) + 1
            batch = max(1, min(_MAX_BATCH, _BATCH_BYTES // row_bytes))
            for found in file.iter_batches(
                batch, row_groups=[number], columns=list(columns), use_threads=False
            ):
                yield from _rows(found, columns)


def _batches(source: pa.NativeFile, *, is_file: bool) -> tuple[Any, Iterator[pa.RecordBatch]]:
    if is_file:
        reader = pa.ipc.open_file(source)
        return reader, (reader.get_batch(i) for i in range(reader.num_record_batches))
    reader = pa.ipc.open_stream(source)
    return reader, iter(reader)


def _arrow_rows(
    path: Path, groups: range, columns: Sequence[str], *, is_file: bool
) -> Generator[dict[str, Any], None, None]:
    with pa.memory_map(str(path)) as source:
        _, batches = _batches(source, is_file=is_file)
        for number, batch in enumerate(batches):
            if number in groups:
                # Offsets come from the file: none may lead out of its own buffers
                batch = batch.select(list(columns))
                batch.validate(full=True)
                for start in range(0, batch.num_rows, _MAX_BATCH):
                    yield from _rows(batch.slice(start, _MAX_BATCH), columns)
            if number + 1 >= groups.stop:
                return


def _rows(batch: pa.RecordBatch, columns: Sequence[str]) -> Generator[dict[str, Any], None, None]:
    arrays = [batch.column(name) for name in columns]
    for index in range(batch.num_rows):
        yield {name: array[index].as_py() for name, array in zip(columns, arrays, strict=True)}


def _decode_names(fields: Iterable[pa.Field]) -> None:
    """Raises UnicodeDecodeError, as whoever asks for a damaged name of a column would."""
    waiting = list(fields)
    while waiting:
        field = waiting.pop()
        _ = field.name
        waiting += [field.type.field(i) for i in range(field.type.num_fields)]


def _footer_hash(path: Path) -> str:
    """Returns a hash of the table of contents at a Parquet file's end: sizes and places of all.

    PyArrow ends the process at some damaged descriptions of columns, so they are not asked for.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(4), "little") + 8
        if length > min(size, _MAX_HEADER):
            raise ValueError(f"a table of contents of {length} bytes")
        file.seek(size - length)
        return hashlib.sha256(file.read(length)).hexdigest()


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
