"""A folder of images: each with a .txt of its name, or all with one table of captions."""

from pathlib import Path

from microdit_jax.errors import UserError, visible
from microdit_jax.files import inside
from microdit_jax.prepare.sources import tables
from microdit_jax.prepare.sources.archives import MAX_TEXT
from microdit_jax.prepare.sources.caption_choice import CAPTION_NAMES, FIRST, CaptionChoice
from microdit_jax.prepare.sources.column_files import open_column_file
from microdit_jax.prepare.sources.listed_images import (
    SUFFIXES,
    UNREAD_SUFFIXES,
    ListedImages,
    SourceImage,
    image_below,
    read_below,
    skipped_image,
)
from microdit_jax.prepare.sources.parquet_images import is_images

_NAMES = ("file_name", "file", "image", "path", "filename")


def open_folder(
    root: Path, captions: Path | None = None, choice: CaptionChoice = FIRST
) -> ListedImages:
    """Opens the images of a folder and its subfolders.

    Args:
      captions: a table with a column file_name (relative to `root`) and a column caption; by
        default captions.jsonl, .csv, .tsv or .parquet in `root`, or metadata.jsonl, .csv or
        .parquet as Hugging Face's image folders have; without one, cat.jpg belongs to cat.txt.
    Raises:
      UserError: no folder, no images, or a table that cannot be read.
    """
    if not root.is_dir():
        raise UserError(
            f"expected a folder of images at {visible(root)}, found none; check --input"
        )
    if captions is None:
        names = [f"{name}{s}" for name in ("captions", "metadata") for s in tables.SUFFIXES]
        name = next((name for name in names if (root / name).exists()), None)
        captions = None if name is None else inside(root, name)
    listed = _with_texts(root) if captions is None else _with_table(root, captions, choice)
    if not listed:
        raise UserError(
            f"expected images ({', '.join(sorted(SUFFIXES))}) below {visible(root)}, found none"
        )
    return ListedImages(listed)


def _with_texts(root: Path) -> list[SourceImage]:
    images = []
    for path in sorted(root.rglob("*")):
        suffix = path.suffix.lower()
        if suffix in UNREAD_SUFFIXES and not path.is_dir():
            name = path.relative_to(root).as_posix()
            images.append(skipped_image(name, f"a format that is not read ({suffix})"))
        if suffix in SUFFIXES and not path.is_dir():
            name = path.relative_to(root).as_posix()
            try:
                caption = read_below(
                    root, str(path.with_suffix(".txt").relative_to(root)), MAX_TEXT
                )
                images.append(image_below(name, caption.decode("utf-8", "replace"), root, name))
            except FileNotFoundError:
                images.append(skipped_image(name, "no caption"))
            except OSError as error:
                images.append(skipped_image(name, f"its caption cannot be read ({error.strerror})"))
            except ValueError as error:
                images.append(skipped_image(name, f"its caption: {error}"))
    return images


def _check_no_images(table: Path) -> None:
    """Raises UserError for a table that has the images themselves in a column."""
    try:
        schema = open_column_file(table).schema
    except UserError:
        return  # reading its rows says what is wrong
    found = [field.name for field in schema if is_images(field.type)]
    if found and not any(name in _NAMES and name not in found for name in schema.names):
        raise UserError(
            f"expected a table of file names and captions in {visible(table)}, found images in its "
            f"column {visible(found[0])}; read them with --source=parquet --input={visible(table)}"
        )


def _with_table(root: Path, table: Path, choice: CaptionChoice) -> list[SourceImage]:
    if table.suffix == ".parquet":
        _check_no_images(table)
    images, seen = [], set()
    for row in tables.rows(table):
        name = tables.column(row, _NAMES, table)
        if not isinstance(name, str | int):
            raise UserError(
                f"expected names of files in {visible(table)}, found {visible(name, 60)} of type "
                f"{type(name).__name__}; for images in a column give --source=parquet"
            )
        name = str(name)
        caption = choice(tables.column(row, CAPTION_NAMES, table), name)
        if name in seen:
            images.append(skipped_image(name, "duplicate id"))
        elif Path(name).is_absolute() or ".." in Path(name).parts:
            images.append(skipped_image(name, "outside of the folder"))
        elif caption is None:
            images.append(skipped_image(name, "no caption"))
        else:
            images.append(image_below(name, caption, root, name))
        seen.add(name)
    return images
