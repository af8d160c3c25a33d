"""COCO and TextCaps: images in folders, captions by image in one json file a split."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json, read_bytes
from microdit_jax.prepare.sources.listed_images import ListedImages, SourceImage, image_below
from microdit_jax.prepare.sources.tables import MAX_JSON


def read_annotations(
    path: Path, root: Path, captions_in: Callable[[Any], Iterable[tuple[str, str | None, str]]]
) -> ListedImages:
    """Reads the images of a json file.

    Args:
      root: folder of the dataset.
      captions_in: gives (id, caption, file below `root`) for each caption; an image's first caption
        counts, as in the reference.
    Raises:
      UserError: the file is missing, or not what it should be.
    """
    images: dict[str, SourceImage] = {}
    try:
        for id, caption, file in captions_in(parse_json(read_bytes(path, MAX_JSON))):
            caption = None if caption is None else str(caption)
            images.setdefault(str(id), image_below(str(id), caption, root, file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"expected captions by image in {visible(path)}, could not read them "
            f"({visible(repr(error), 200)}); download the file again (docs/datasets.md)"
        ) from error
    return ListedImages(list(images.values()))
