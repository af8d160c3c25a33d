"""COCO 2014 and TextCaps: images in folders, captions by image in one json file a split."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.listed_images import ListedImages, SourceImage, image_file


def read_annotations(
    path: Path, captions_in: Callable[[Any], Iterable[tuple[str, str, Path]]]
) -> ListedImages:
    """Reads the images of a json file.

    Args:
      captions_in: gives (id, caption, file) for each caption; an image's first caption counts,
        as in the reference.
    Raises:
      UserError: the file is missing, or not what it should be.
    """
    images: dict[str, SourceImage] = {}
    try:
        for id, caption, file in captions_in(json.loads(path.read_text(encoding="utf-8"))):
            images.setdefault(id, image_file(id, caption, file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"expected captions by image in {path}, could not read them ({error!r}); download "
            "the file again (docs/datasets.md)"
        ) from error
    return ListedImages(list(images.values()))
