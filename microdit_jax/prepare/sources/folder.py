"""A folder of images: each with a .txt of its name, or all with one table of captions."""

from pathlib import Path

from microdit_jax.errors import UserError
from microdit_jax.prepare.sources import tables
from microdit_jax.prepare.sources.listed_images import (
    SUFFIXES,
    ListedImages,
    SourceImage,
    image_file,
    skipped_image,
)

_NAMES = ("file_name", "file", "image", "path", "filename")
_CAPTIONS = ("caption", "text", "prompt")


def open_folder(root: Path, captions: Path | None = None) -> ListedImages:
    """Opens the images of a folder and its subfolders.

    Args:
      captions: a table with a column file_name (relative to `root`) and a column caption; by
        default captions.jsonl, .csv, .tsv or .parquet in `root`, or metadata.jsonl, .csv or
        .parquet as Hugging Face's image folders have; without one, cat.jpg belongs to cat.txt.
    Raises:
      UserError: no folder, no images, or a table that cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"expected a folder of images at {root}, found none; check --input")
    if captions is None:
        names = [f"{name}{s}" for name in ("captions", "metadata") for s in tables.SUFFIXES]
        captions = next((root / name for name in names if (root / name).is_file()), None)
    listed = _with_texts(root) if captions is None else _with_table(root, captions)
    if not listed:
        raise UserError(f"expected images ({', '.join(sorted(SUFFIXES))}) below {root}, found none")
    return ListedImages(listed)


def _with_texts(root: Path) -> list[SourceImage]:
    images = []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            name, text = path.relative_to(root).as_posix(), path.with_suffix(".txt")
            if text.is_file():
                caption = text.read_text(encoding="utf-8", errors="replace")
                images.append(image_file(name, caption, path))
            else:
                images.append(skipped_image(name, "no caption"))
    return images


def _with_table(root: Path, table: Path) -> list[SourceImage]:
    images, seen = [], set()
    for row in tables.rows(table):
        name = str(tables.column(row, _NAMES, table))
        caption, path = tables.column(row, _CAPTIONS, table), root / name
        if name in seen:
            images.append(skipped_image(name, "duplicate id"))
        elif Path(name).is_absolute() or ".." in Path(name).parts:
            images.append(skipped_image(name, "outside of the folder"))
        elif caption is None:
            images.append(skipped_image(name, "no caption"))
        else:
            images.append(image_file(name, str(caption), path))
        seen.add(name)
    return images
