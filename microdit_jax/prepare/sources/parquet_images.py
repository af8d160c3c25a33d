"""Images in the columns of Parquet and Arrow files, as Hugging Face and img2dataset write them."""

import contextlib
import functools
import glob
import hashlib
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from microdit_jax.errors import UserError, visible
from microdit_jax.files import inside, read_json
from microdit_jax.files.image_files import MAX_BYTES
from microdit_jax.prepare.sources import column_process
from microdit_jax.prepare.sources.caption_choice import CAPTION_NAMES, FIRST, CaptionChoice
from microdit_jax.prepare.sources.column_files import ColumnFile, open_column_file
from microdit_jax.prepare.sources.column_process import DamagedRows
from microdit_jax.prepare.sources.listed_images import (
    SourceImage,
    WholeParts,
    read_below,
    skipped_image,
)

SUFFIXES = (".parquet", ".arrow")
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "images")
_PART = 1000  # rows at least, where a file has smaller groups of rows
# Hugging Face's names: train/0000.parquet, train-00000-of-00005.parquet
_SPLITS = {"train", "training", "test", "testing", "eval", "val", "valid", "validation", "dev"}
_SPLIT_NAME = re.compile(r"(.+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")


class _Part(NamedTuple):
    """Groups of rows of one file, which follow each other."""

    file: int
    groups: range
    first_row: int
    rows: int


class ParquetImages(WholeParts):
    """A source whose parts are groups of rows, at least 1,000 rows where a file has as many.

    Attributes:
      notes: lines that tell which columns are read.
    """

    def __init__(
        self,
        input: str,
        *,
        split: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        choice: CaptionChoice = FIRST,
    ):
        """
        Args:
          input: a file, a folder (of `save_to_disk` too) or a pattern of names, as in a shell.
          split: the files of which split are read.
          image_column, caption_column: their names; the usual ones are found.
        Raises:
          UserError: no files, a damaged one, no such columns, or several splits and none is named.
        """
        self._root, paths = _files(input, split)
        self._choice = choice
        self._paths = paths
        self._names = [path.relative_to(self._root).as_posix() for path in paths]
        self._files = [open_column_file(path) for path in paths]
        schema = self._files[0].schema
        self._image = _image_column(schema, image_column, paths[0])
        self._caption = _caption_column(schema, caption_column, paths[0])
        self._columns = [self._image, self._caption]
        if "status" in schema.names:  # img2dataset's, of images that it could not fetch
            self._columns.append("status")
        kinds = {field.name: field.type for field in schema}
        for path, file in zip(paths, self._files, strict=True):
            found = {field.name: field.type for field in file.schema}
            for name in self._columns:
                if found.get(name) != kinds[name]:
                    raise UserError(
                        f"expected the columns of {visible(paths[0])} in {visible(path)} too, "
                        f"found none or another kind for {visible(name)}; give files of one dataset"
                    )
        self._parts = list(_parts(self._files))
        self.parts = [
            f"{self._names[p.file]} rows {p.first_row} to {p.first_row + p.rows - 1}"
            for p in self._parts
        ]
        self.notes = [
            f"columns: images in {visible(self._image)}, captions in {visible(self._caption)} "
            f"(of {visible(', '.join(schema.names))}; --image_column and --caption_column choose)"
        ]

    def fingerprint(self, part: int) -> str:
        """Returns what changes when the part's rows do, of the file's own table of contents."""
        chosen = self._parts[part]
        text = f"{self._names[chosen.file]}:{self._files[chosen.file].describe(chosen.groups)}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    def read(self, part: int) -> Generator[SourceImage, None, None]:
        """Yields the images of one part, a few of which are in memory at a time."""
        chosen = self._parts[part]
        path, name = self._paths[chosen.file], self._names[chosen.file]
        stem, count = name.rsplit(".", 1)[0], 0
        try:
            found = column_process.rows(path, chosen.groups, self._columns)
            with contextlib.closing(found) as rows:
                for row in rows:
                    if count == chosen.rows:
                        raise DamagedRows("more than the file says")
                    yield self._image_of(row, f"{stem}/{chosen.first_row + count}")
                    count += 1
            if count < chosen.rows:
                raise DamagedRows("fewer than the file says")
        except DamagedRows as error:
            left = f"rows {chosen.first_row + count} to {chosen.first_row + chosen.rows - 1}"
            reason = f"{left} are damaged or too large ({error})"
            yield skipped_image(f"{stem}/{chosen.first_row + count}", reason)

    def _image_of(self, row: dict[str, Any], id: str) -> SourceImage:
        value, caption = row[self._image], self._choice(row[self._caption], id)
        if caption is None:
            return skipped_image(id, "no caption")
        data = value.get("bytes") if isinstance(value, dict) else value
        path = value.get("path") if isinstance(value, dict) else None
        if data is None and path:
            load = functools.partial(read_below, self._root, path, MAX_BYTES)
            return SourceImage(id, caption, load)
        if not data:
            status = row.get("status")
            return skipped_image(id, f"no image ({status})" if status else "no image")
        if len(data) > MAX_BYTES:
            return skipped_image(id, f"a file of {len(data)} bytes")
        return SourceImage(id, caption, lambda: data, num_bytes=len(data))


def _parts(files: Sequence[ColumnFile]) -> Iterator[_Part]:
    """Joins small groups of rows of one file; empty ones are left out."""
    for number, file in enumerate(files):
        first, rows, first_row = 0, 0, 0
        for group, size in enumerate(file.group_rows):
            rows += size
            if rows and (rows >= _PART or group == len(file.group_rows) - 1):
                yield _Part(number, range(first, group + 1), first_row, rows)
                first, first_row, rows = group + 1, first_row + rows, 0


# ------------------------------------------------------------------ files
def _files(input: str, split: str | None) -> tuple[Path, list[Path]]:
    """Finds the files that --input names, and the folder that all are in."""
    path = Path(input)
    if path.is_dir():
        root, found = path, _in_folder(path)
        splits = {file: _split_of(file, root) for file in found}
        names = sorted({name for name in splits.values() if name is not None})
        if split is None and len(names) > 1:
            raise UserError(
                f"{visible(path)} has the splits {visible(', '.join(names))}; choose one with "
                "--split, or give a pattern of names as --input"
            )
        if split is not None:
            if split not in names:
                raise UserError(
                    f"expected the split {split!r} in {visible(path)}, found "
                    f"{visible(', '.join(names)) or 'none'}"
                )
            found = [file for file in found if splits[file] == split]
    elif split is not None:
        raise UserError("--split chooses in a folder; --input names the files themselves here")
    elif path.exists():
        root, found = path.parent, [path]
    else:
        found = sorted(Path(name) for name in glob.glob(input, recursive=True))
        found = [file for file in found if not file.is_dir()]
        root = _common_folder(found)
    if not found:
        raise UserError(
            f"expected files of {' or '.join(SUFFIXES)} at {visible(input)}, found none; "
            "check --input"
        )
    return root, found


def _common_folder(files: Sequence[Path]) -> Path:
    parents = [set(file.parents) for file in files]
    common = set.intersection(*parents) if parents else {Path()}
    return max(common, key=lambda folder: len(folder.parts))


def _in_folder(root: Path) -> list[Path]:
    """Lists a folder's files; where save_to_disk wrote, those that its state.json names."""
    found = {file for suffix in SUFFIXES for file in root.rglob(f"*{suffix}")}
    for state in root.rglob("state.json"):
        try:
            files = read_json(state).get("_data_files")
            named = {inside(state.parent, file["filename"]) for file in files or []}
        except (OSError, KeyError, TypeError) as error:
            raise UserError(
                f"expected Hugging Face's list of files in {visible(state)}, could not read it "
                f"({type(error).__name__}); write the dataset again"
            ) from error
        if files is None:
            continue
        if missing := sorted(file.name for file in named if not file.is_file()):
            raise UserError(
                f"expected {visible(missing[0])} beside {visible(state)}, found no such file; "
                "copy the whole folder"
            )
        found -= {file for file in found if file.parent == state.parent}  # caches of transforms
        found |= named
    return sorted(inside(root, str(file.relative_to(root))) for file in found)


def _split_of(file: Path, root: Path) -> str | None:
    """Names the split of a file by Hugging Face's rules: its name, or its folder's."""
    if (file.parent.parent / "dataset_dict.json").exists() and file.parent != root:
        return file.parent.name
    match = _SPLIT_NAME.fullmatch(file.stem)
    if match and match[1] != "data":
        return match[1]
    folders = [folder.name for folder in file.parents if root in folder.parents]
    return next((name for name in (file.stem, *folders) if name.lower() in _SPLITS), None)


# ------------------------------------------------------------------ columns
def is_images(kind: pa.DataType) -> bool:
    """Returns True for a column of bytes, or of Hugging Face's bytes with a path."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_images(kind.field("bytes").type)
    return (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _is_captions(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        return _is_captions(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or (
        pa.types.is_string_view(kind)
    )  # fmt: skip


def _image_column(schema: pa.Schema, asked: str | None, path: Path) -> str:
    fitting = [field.name for field in schema if is_images(field.type)]
    return _chosen(schema, asked, fitting, IMAGE_NAMES, path, "image", "bytes, or bytes and path")


def _caption_column(schema: pa.Schema, asked: str | None, path: Path) -> str:
    fitting = [field.name for field in schema if _is_captions(field.type)]
    return _chosen(schema, asked, fitting, CAPTION_NAMES, path, "caption", "texts or lists of them")


def _chosen(
    schema: pa.Schema,
    asked: str | None,
    fitting: Sequence[str],
    usual: Sequence[str],
    path: Path,
    what: str,
    kinds: str,
) -> str:
    if asked is not None:
        if fitting.count(asked) == 1:
            return asked
    else:
        named = [name for word in usual for name in fitting if name.lower() == word]
        if named or len(fitting) == 1:
            return (*named, *fitting)[0]
    columns = ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema)
    raise UserError(
        f"expected a column {visible(asked) if asked else f'of {what}s'} ({kinds}) in "
        f"{visible(path)}, found {visible(columns, 2000)}; name one with --{what}_column"
        + ("" if what != "image" or fitting else ", or, if the images lie in tars or folders "
           "beside this table, give --source=webdataset or folder")
    )  # fmt: skip
