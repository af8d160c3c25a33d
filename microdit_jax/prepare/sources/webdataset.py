"""Tar shards as the webdataset library and img2dataset write them."""

import glob
import os
import re
from pathlib import Path
from typing import Any

from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json
from microdit_jax.prepare.sources.archived_images import ArchivedImages, CaptionIn, find_archives
from microdit_jax.prepare.sources.caption_choice import CAPTION_NAMES, FIRST, CaptionChoice

_PATTERNS = ("*.tar", "*.tar.gz", "*.tgz", "*.tar.bz2")
_MAX_NAMES = 1_000_000  # that braces may stand for
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def open_webdataset(
    input: str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    choice: CaptionChoice = FIRST,
) -> ArchivedImages:
    """Opens tars with captions in .txt, .caption or .json members beside the images.

    Args:
      input: a folder, whose subfolders count too; one tar; or a pattern with braces, such as
        shards/{00000..00012}.tar, or stars.
      image_column, caption_column: the endings of the members that are taken, such as input.jpg;
        of captions also a field in the .json members.
    Raises:
      UserError: there are no such tars.
    """
    root, archives = _archives(input)
    names = [path.relative_to(root).as_posix() for path in archives]
    ending = None if image_column is None else f".{image_column.lower().lstrip('.')}"
    caption_in = caption_in_text(caption_column)
    return ArchivedImages(
        archives,
        caption_in=caption_in,
        names=names,
        whole_keys=True,
        image_ending=ending,
        choice=choice,
    )


def caption_in_text(column: str | None = None) -> CaptionIn:
    """Makes what reads a caption: a .txt or .caption as it is, of a .json the usual fields."""
    asked = None if column is None else f".{column.lower().lstrip('.')}"

    def caption_in(ending: str, data: bytes) -> Any:
        if not ending.endswith(".json"):
            return data.decode("utf-8", "replace") if asked in (None, ending) else None
        try:
            fields = parse_json(data)
        except ValueError:
            return None
        if not isinstance(fields, dict):
            return None
        names = CAPTION_NAMES if column is None or asked == ending else (column,)
        found = (fields[name] for name in names if name in fields)
        return next((value for value in found if value is not None), None)

    return caption_in


def _archives(input: str) -> tuple[Path, list[Path]]:
    """Finds the tars that --input names, and the folder that all are in."""
    path = Path(input)
    if path.is_dir():
        return path, find_archives(path, *(f"**/{pattern}" for pattern in _PATTERNS))
    if path.exists():
        return path.parent, [path]
    found = []
    for name in expand_braces(input):
        here = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        if not here or not os.path.exists(here[0]):
            raise UserError(
                f"expected a tar at {visible(name)}, found none; check --input, or download the "
                "shard"
            )
        found += [Path(each) for each in here]
    found = list(dict.fromkeys(found))
    return Path(os.path.commonpath([file.parent for file in found])), found


def expand_braces(text: str) -> list[str]:
    """Expands {00000..00012} and {a,b} as a shell does; several multiply.

    Raises:
      UserError: they stand for more than a million names.
    """
    found = [""]
    at = 0
    for match in _BRACES.finditer(text):
        inside = match[1]
        if span := _RANGE.fullmatch(inside):
            first, last = int(span[1]), int(span[2])
            count, step = abs(last - first) + 1, 1 if last >= first else -1
            width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
            _check_count(text, count * len(found))
            options = [str(first + i * step).zfill(width) for i in range(count)]
        elif "," in inside:
            options = inside.split(",")
            _check_count(text, len(options) * len(found))
        else:
            options = [match[0]]
        before = text[at : match.start()]
        found = [f"{start}{before}{option}" for start in found for option in options]
        at = match.end()
    return [f"{start}{text[at:]}" for start in found]


def _check_count(text: str, count: int) -> None:
    if count > _MAX_NAMES:
        raise UserError(
            f"expected at most {_MAX_NAMES:,} names in --input, found {count:,} in {visible(text)}"
        )
