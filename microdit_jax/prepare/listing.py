"""Listing of a source when its job began: changes are refused, growth makes new parts.

Without it, images that were added would be ignored, or would shift the parts that are not done yet.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from microdit_jax.errors import UserError, visible
from microdit_jax.files import read_json, write_bytes
from microdit_jax.prepare.sources.listed_images import ImageSource

LISTING = "listing.json"
_MAX_LISTING = 1 << 32  # bytes; of single files, each has a line
_SHOWN = 3  # names in an error


def agree(folder: Path, source: ImageSource, *, append: bool = False) -> ImageSource:
    """Compares a source with the listing of the job, which the first process writes.

    Args:
      folder: of the job, which has begun.
      append: make new parts, after those that there are, of what the source has more.
    Returns:
      the source with the job's parts, in the job's order.
    Raises:
      UserError: the source has other contents than the job, named; or the listing is damaged.
    """
    path = folder / LISTING
    here = [source.listing(part) for part in range(len(source.parts))]
    if not path.exists():  # of several processes the first decides
        write_bytes(path, _text(here), replace=False)
    stored = _read(path)
    now = {key: value for part in here for key, value in part.items()}
    before = {key: value for part in stored for key, value in part.items()}
    changed = [key for key in before if now.get(key) != before[key]]
    added = [key for key in now if key not in before]
    if changed:
        raise UserError(
            f"{folder} was begun with another listing: {len(changed):,} changed or gone "
            f"({_some(changed)}), {len(added):,} new; bring back what was there, or choose another "
            "folder for the output"
        )
    if added and not append:
        raise UserError(
            f"{folder} was begun when the source had less: {len(added):,} are new "
            f"({_some(added)}); give --append to make new parts of them, or choose another folder "
            "for the output"
        )
    if added:
        size = source.part_size
        groups = (added[at : at + size] for at in range(0, len(added), size))
        stored += [{key: now[key] for key in group} for group in groups]
        write_bytes(path, _text(stored))  # the same bytes in every process
    if [list(part) for part in stored] == [list(part) for part in here]:
        return source
    return source.regrouped([list(part) for part in stored])


def _text(parts: Sequence[dict[str, str]]) -> bytes:
    return (json.dumps({"parts": parts}) + "\n").encode()


def _read(path: Path) -> list[dict[str, str]]:
    parts = read_json(path, _MAX_LISTING).get("parts")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"expected a job's listing in {path}, found damage; delete {path.parent}")
    return parts


def _some(keys: Sequence[str]) -> str:
    return visible(", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else ""))
