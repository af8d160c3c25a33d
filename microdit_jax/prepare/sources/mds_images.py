"""Images stored in MDS datasets, such as the reference makes before its latents."""

import functools
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from microdit_jax.data import mds_encodings
from microdit_jax.data.mds import MdsReader
from microdit_jax.errors import UserError, visible
from microdit_jax.files.image_files import MAX_BYTES, MAX_PIXELS, UnusableImage
from microdit_jax.prepare.sources.caption_choice import FIRST, CaptionChoice
from microdit_jax.prepare.sources.listed_images import SourceImage, WholeParts, skipped_image

_IMAGES = ("jpeg", "png", "pil")
_IMAGE_NAMES = ("jpg", "jpeg", "png", "image", "img")


class MdsImages(WholeParts):
    """A source whose parts are the shards of an MDS dataset."""

    def __init__(
        self, root: str | os.PathLike, *, cache: str | None = None, choice: CaptionChoice = FIRST
    ):
        """Raises UserError where the dataset has no column of images or none of captions."""
        self._choice = choice
        self._reader = MdsReader(root, cache=cache)
        columns = self._reader.columns
        images = [name for name, kind in columns.items() if kind in _IMAGES]
        images += [name for name in _IMAGE_NAMES if columns.get(name) == "bytes"]
        captions = [
            name
            for name, kind in columns.items()
            if name.startswith("caption") and kind in ("str", "json")
        ]
        if columns and not (images and captions):
            raise UserError(
                f"expected a column of images ({', '.join(_IMAGES)}) and one of captions in "
                f"{visible(root)}, found {visible(columns)}"
            )
        self._image, self._caption = (*images, "")[0], (*captions, "")[0]
        sizes = (shard.samples for shard in self._reader.shards)
        self._starts = [0, *itertools.accumulate(sizes)]
        self.parts = [shard.raw.name for shard in self._reader.shards]

    def fingerprint(self, part: int) -> str:
        """Returns what the index says of a shard, and where its samples begin, which are ids."""
        shard = self._reader.shards[part]
        return f"{self._starts[part]} {shard.samples} {shard.raw.size}"

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one shard."""
        start = self._starts[part]
        for index in range(start, start + self._reader.shards[part].samples):
            try:
                raw = self._reader.raw(index)
                caption = self._choice(self._decode(self._caption, raw), str(index))
            except Exception as error:  # a decoder raises whatever fits the damage
                reason = f"{type(error).__name__}: {error}".removeprefix("UserError: ")
                yield skipped_image(str(index), f"damaged sample: {reason}")
                continue
            load = functools.partial(self._decode, self._image, raw)
            yield SourceImage(str(index), caption, load)

    def _decode(self, column: str, raw: Mapping[str, memoryview]) -> Any:
        kind, data = self._reader.columns[column], raw[column]
        if len(data) > MAX_BYTES:
            raise UnusableImage(f"{len(data)} bytes of {column}")
        if kind == "pil" and math.prod(map(int, np.frombuffer(data[:8], "<u4"))) > MAX_PIXELS:
            raise UnusableImage(f"more than {MAX_PIXELS // 10**6} megapixels")
        return mds_encodings.parse(kind).decode(data)
