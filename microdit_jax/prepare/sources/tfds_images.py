"""Captioned images of a TFDS dataset in a random-access format, read without TensorFlow."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from microdit_jax.data.arrayrecord import Example
from microdit_jax.data.tfds_folder import Feature, open_records, read_features
from microdit_jax.errors import UserError, visible
from microdit_jax.prepare.sources.caption_choice import FIRST, CaptionChoice
from microdit_jax.prepare.sources.listed_images import SourceImage, WholeParts, skipped_image

_PART = 1000
_CAPTIONS = ("caption", "captions", "text")


class TfdsImages(WholeParts):
    """A source whose parts are runs of 1,000 records.

    Images are taken as the files that TFDS stores, and decoded as all others are.
    """

    def __init__(self, folder: str, split: str, choice: CaptionChoice = FIRST):
        """
        Args:
          folder: of the prepared dataset, with its dataset_info.json.
        Raises:
          UserError: no such dataset or split, or none with an image and a caption.
        """
        self._choice = choice
        self._records = open_records(folder, split)
        features = read_features(folder)
        caption = next((name for name in _CAPTIONS if name in features), None)
        if "image" not in features or caption is None:
            raise UserError(
                f"expected the features image and caption in {visible(folder)}, found "
                f"{visible(', '.join(features))}"
            )
        self._loader = _loader(features["image"], folder)
        self._caption = _stored_name(caption, features[caption])
        starts = range(0, len(self._records), _PART)
        self.parts = [f"records {i} to {min(i + _PART, len(self._records)) - 1}" for i in starts]

    def fingerprint(self, part: int) -> str:
        """Returns nothing more than the part's name says: TFDS datasets are made once."""
        return self.parts[part]

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one part."""
        for index in range(part * _PART, min((part + 1) * _PART, len(self._records))):
            try:
                stored = Example.FromString(self._records[index]).features.feature
                texts = list(stored[self._caption].bytes_list.value)
                caption = self._choice(texts or "", str(index))
                load = self._loader(stored["image"])
            except Exception as error:  # array_record, protobuf and NumPy have their own
                yield skipped_image(str(index), f"damaged record ({type(error).__name__})")
                continue
            yield SourceImage(str(index), caption, load)


def _stored_name(name: str, feature: Feature) -> str:
    """Returns the name under which TFDS stores a text, which may be in a list or dictionary."""
    while feature.children:
        if "" in feature.children:
            feature = feature.children[""]
        elif "text" in feature.children:
            name, feature = f"{name}/text", feature.children["text"]
        else:
            raise UserError(
                f"expected texts in the feature {visible(name)}, found "
                f"{visible(', '.join(feature.children))}"
            )
    return name


def _loader(image: Feature, folder: str) -> Callable[[Any], Callable[[], bytes | Image.Image]]:
    """Returns what makes a function that gives an image, of its stored feature."""
    if image.kind in ("Image", "LabeledImage") and image.dtype in ("", "uint8", "uint16"):
        return lambda stored: lambda data=stored.bytes_list.value[0]: data
    if image.kind != "Tensor" or image.dtype != "uint8" or image.encoding not in ("none", "bytes"):
        raise UserError(
            f"expected files or bytes in the feature image of {visible(folder)}, found "
            f"{visible(f'{image.kind} {image.dtype} {image.encoding}')}; write it as "
            "tfds.features.Image"
        )

    def pixels(stored: Any) -> Callable[[], Image.Image]:
        if image.encoding == "bytes":
            values = np.frombuffer(stored.bytes_list.value[0], np.uint8)
        else:
            values = np.array(stored.int64_list.value, np.uint8)
        array = np.squeeze(values.reshape(image.shape))
        return lambda: Image.fromarray(array)

    return pixels
