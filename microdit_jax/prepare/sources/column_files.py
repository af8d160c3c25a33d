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

    def rows(self, groups: range, columns: Sequence[str]) -> Generator[dict[str, Any], None, None]:
        """Yields the rows of some groups.

        Raises:
          pa.ArrowException, OSError, ValueError, MemoryError: damage.
        """
        ...


def open_column_file(path: Path) -> ColumnFile:
    """Opens a file by its first bytes: Parquet, or Arrow as a file or as a stream.

    Raises:
      UserError: it is none of these, or damaged.
    """
    try:
        with open_regular(path) as opened:
            magic = opened.read(6)
        if magic[:4] == b"PAR1":
            file = _Parquet(path)
        else:
            file = _Arrow(path, is_file=magic == b"ARROW1")
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
        self._path, self._footer = path, _footer_hash(path)
        with self._open() as file:
            self.schema, metadata = file.schema_arrow, file.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            self.group_rows = [group.num_rows for group in groups]
            if min(self.group_rows, default=0) < 0:
                raise ValueError("a negative number of rows")
            self._bytes = [max(group.total_byte_size, 0) for group in groups]

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(
            self._path,
            buffer_size=_BUFFER,
            pre_buffer=False,
            page_checksum_verification=True,
            thrift_container_size_limit=10**7,
            thrift_string_size_limit=_MAX_HEADER,
        )

    def describe(self, groups: range) -> str:
        return f"{groups} {self._footer}"

    def rows(self, groups: range, columns: Sequence[str]) -> Generator[dict[str, Any], None, None]:
        with self._open() as file:
            for group in groups:
                row_bytes = self._bytes[group] // max(self.group_rows[group], 1) + 1
                batch = max(1, min(_MAX_BATCH, _BATCH_BYTES // row_bytes))
                for found in file.iter_batches(
                    batch, row_groups=[group], columns=list(columns), use_threads=False
                ):
                    yield from _rows(found, columns)


class _Arrow:
    """An Arrow stream, as Hugging Face writes it, or file; its batches are the groups of rows."""

    def __init__(self, path: Path, *, is_file: bool):
        self._path, self._is_file = path, is_file
        self.group_rows, self._texts = [], []
        with pa.memory_map(str(path)) as source:
            reader, batches = self._batches(source)
            self.schema = reader.schema
            for batch in batches:  # mapped: the rows themselves are not read
                self.group_rows.append(batch.num_rows)
                batch.validate()
                self._texts.append(f"{batch.num_rows} {batch.get_total_buffer_size()}")

    def _batches(self, source: pa.NativeFile) -> tuple[Any, Iterator[pa.RecordBatch]]:
        if self._is_file:
            reader = pa.ipc.open_file(source)
            return reader, (reader.get_batch(i) for i in range(reader.num_record_batches))
        reader = pa.ipc.open_stream(source)
        return reader, iter(reader)

    def describe(self, groups: range) -> str:
        return _digest(self._texts[i] for i in groups)

    def rows(self, groups: range, columns: Sequence[str]) -> Generator[dict[str, Any], None, None]:
        with pa.memory_map(str(self._path)) as source:
            _, batches = self._batches(source)
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
