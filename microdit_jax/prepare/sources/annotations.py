"""COCO 2014 and TextCaps: pictures in folders, captions by picture in one json file a split."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.pictures import ListedPictures, Picture, picture_file


def read_annotations(
    path: Path, pictures_of: Callable[[Any], Iterable[tuple[str, str, Path]]]
) -> ListedPictures:
    """The pictures of a json file.

    Args:
      pictures_of: gives (id, caption, file) for each caption; a picture's first caption counts,
        as in the reference.
    Raises:
      UserError: the file is missing, or not what it should be.
    """
    pictures: dict[str, Picture] = {}
    try:
        for id, caption, file in pictures_of(json.loads(path.read_text(encoding="utf-8"))):
            pictures.setdefault(id, picture_file(id, caption, file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"expected captions by picture in {path}, could not read them ({error!r}); download "
            "the file again (docs/datasets.md)"
        ) from error
    return ListedPictures(list(pictures.values()))
