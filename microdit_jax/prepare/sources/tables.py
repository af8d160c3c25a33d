"""Tables of captions: .jsonl, .json, .csv, .tsv and .parquet files, row by row."""

import csv
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microdit_jax.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table; a .json file holds a list of them, a .tgz one .jsonl file.

    Args:
      columns: the names of a .csv or .tsv file without a header line; of a .parquet file, those
        to read.
    Raises:
      UserError: the file cannot be read as what its name says.
    """
    number = 0
    try:
        for number, row in enumerate(_rows(path, columns), start=1):  # noqa: B007
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__} in place of a row")
            yield row
    except (OSError, ValueError, csv.Error, tarfile.TarError, EOFError, pa.ArrowException) as error:
        raise UserError(
            f"expected a table of captions in {path}, could not read it after row {number} "
            f"({error}); mend the file or download it again"
        ) from error


def _rows(path: Path, columns: Sequence[str] | None) -> Iterator[Any]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=None if columns is None else list(columns)):
                yield from batch.to_pylist()
    elif path.suffix == ".json":
        yield from json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())
    elif path.suffix == ".tgz":
        with tarfile.open(path) as archive:
            for info in archive:
                file = archive.extractfile(info) if info.name.endswith(".jsonl") else None
                if file is not None:
                    lines = io.TextIOWrapper(file, encoding="utf-8")
                    yield from (json.loads(line) for line in lines if line.strip())
    else:
        csv.field_size_limit(10**7)
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix == ".tsv":  # where quotes are plain text
                reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                reader = csv.reader(file)
            names = columns or next(reader, [])
            for values in reader:
                if len(values) != len(names):
                    raise ValueError(f"{len(values)} values for {len(names)} columns")
                yield dict(zip(names, values, strict=True))


def column(row: dict[str, Any], names: Sequence[str], path: Path) -> Any:
    """Returns the value of the first of `names` that a row has; raises UserError for none."""
    for name in names:
        if name in row:
            return row[name]
    raise UserError(
        f"expected a column {' or '.join(names)} in {path}, found {', '.join(map(str, row))}; "
        "rename one"
    )
