"""Tables of captions: .jsonl, .json, .csv, .tsv and .parquet files, row by row."""

import contextlib
import csv
import io
import tarfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from microdit_jax.errors import UserError, visible
from microdit_jax.files import open_regular, parse_json, read_bytes
from microdit_jax.prepare.sources import column_process
from microdit_jax.prepare.sources.column_files import open_column_file
from microdit_jax.prepare.sources.tar_stream import tar_members

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
MAX_JSON = 1 << 30  # bytes of a file that is read whole
_ANNOTATIONS = {"annotations", "images", "data"}  # of files of another kind
_MAX_LINE = 16 << 20  # characters


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
        with contextlib.closing(_rows(path, columns)) as found:
            for number, row in enumerate(found, start=1):  # noqa: B007
                if not isinstance(row, dict):
                    raise ValueError(f"a {type(row).__name__} in place of a row")
                yield row
    except UserError:
        raise
    except (OSError, ValueError, csv.Error, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"expected a table of captions in {visible(path)}, could not read it after row "
            f"{number} ({visible(error, 200)}); mend the file or download it again"
        ) from error


def _rows(path: Path, columns: Sequence[str] | None) -> Generator[Any, None, None]:
    if path.suffix == ".parquet":
        file = open_column_file(path)
        groups = range(len(file.group_rows))
        yield from column_process.rows(path, groups, columns or file.schema.names)
    elif path.suffix == ".json":
        contents = parse_json(read_bytes(path, MAX_JSON))
        if isinstance(contents, dict) and (found := _ANNOTATIONS & contents.keys()):
            raise UserError(
                f"expected a list of rows in {visible(path)}, found annotations "
                f"({', '.join(sorted(found))}), as COCO and TextCaps have them; give "
                "--source=coco2014, coco2017 or textcaps with the folder that holds them, or make "
                "a table of file_name and caption"
            )
        if not isinstance(contents, list):
            raise ValueError(f"a {type(contents).__name__} in place of a list of rows")
        yield from contents
    elif path.suffix == ".jsonl":
        with open_regular(path) as file:
            yield from (parse_json(line) for line in _lines(file) if line.strip())
    elif path.suffix == ".tgz":
        for member in tar_members(path):
            if member.kind == "file" and member.name.endswith(".jsonl"):
                yield from (parse_json(line) for line in _lines(member.file) if line.strip())
    else:
        csv.field_size_limit(10**7)
        with open_regular(path) as file:
            lines = _lines(file, newline="")
            if path.suffix == ".tsv":  # where quotes are plain text
                reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                reader = csv.reader(lines)
            names = columns or next(reader, [])
            for values in reader:
                if len(values) != len(names):
                    raise ValueError(f"{len(values)} values for {len(names)} columns")
                yield dict(zip(names, values, strict=True))


def _lines(file: io.BufferedReader, newline: str | None = None) -> Iterator[str]:
    """Yields the lines of a text in UTF-8; raises ValueError for one that does not end."""
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text:
        while line := text.readline(_MAX_LINE + 1):
            if len(line) > _MAX_LINE:
                raise ValueError(f"a line of more than {_MAX_LINE} characters")
            yield line


def column(row: dict[str, Any], names: Sequence[str], path: Path) -> Any:
    """Returns the value of the first of `names` that a row has; raises UserError for none."""
    for name in names:
        if name in row:
            return row[name]
    raise UserError(
        f"expected a column {' or '.join(names)} in {visible(path)}, found "
        f"{visible(', '.join(map(str, row)))}; rename one"
    )


def text(row: dict[str, Any], names: Sequence[str], path: Path) -> str | None:
    """Returns the text of the first of `names` that a row has, None for null; raises UserError."""
    value = column(row, names, path)
    return None if value is None else str(value)
