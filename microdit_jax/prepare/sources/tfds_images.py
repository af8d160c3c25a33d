"""Captioned images of a TFDS dataset in a random-access format, read without TensorFlow."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from microdit_jax.data.arrayrecord import open_builder
from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.listed_images import SourceImage, skipped_image

_PART = 1000
_CAPTIONS = ("caption", "captions", "text")


class TfdsImages:
    """A source whose parts are runs of 1,000 records."""

    attribution = ""

    def __init__(self, folder: str, split: str):
        """
        Args:
          folder: of the prepared dataset, with its dataset_info.json.
        Raises:
          UserError: no such dataset or split, or none with an image and a caption.
        """
        try:
            builder = open_builder(folder)
            self._records = builder.as_data_source(split)
        except Exception as error:  # TFDS has no error class of its own
            raise UserError(
                f"expected a TFDS dataset with a split {split!r} in ArrayRecord files in {folder}, "
                f"could not open it ({error}); prepare it with file_format=array_record"
            ) from error
        names = list(builder.info.features)
        self._caption = next((name for name in _CAPTIONS if name in names), None)
        if "image" not in names or self._caption is None:
            raise UserError(
                f"expected the features image and caption in {folder}, found {', '.join(names)}"
            )
        starts = range(0, len(self._records), _PART)
        self.parts = [f"records {i} to {min(i + _PART, len(self._records)) - 1}" for i in starts]

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one part."""
        for index in range(part * _PART, min((part + 1) * _PART, len(self._records))):
            try:
                record = self._records[index]
                caption = _text(record[self._caption])
            except (RuntimeError, ValueError, OSError, KeyError) as error:
                yield skipped_image(str(index), f"damaged record ({type(error).__name__})")
                continue
            pixels = np.squeeze(record["image"])
            yield SourceImage(str(index), caption, lambda pixels=pixels: Image.fromarray(pixels))


def _text(value: object) -> str:
    """Returns a text, or the first of several: bytes, a list, or a dictionary of a "text" list."""
    if isinstance(value, dict):
        value = value["text"]
    if isinstance(value, list | np.ndarray) and len(np.shape(value)):
        value = value[0] if len(value) else ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
