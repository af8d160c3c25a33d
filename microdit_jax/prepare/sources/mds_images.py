"""Images stored in MDS datasets, such as the reference makes before its latents."""

import os
from collections.abc import Iterator

from microdit_jax.data import mds_encodings
from microdit_jax.data.mds import MdsReader
from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.listed_images import SourceImage, skipped_image

_IMAGES = ("jpeg", "png", "pil")
_IMAGE_NAMES = ("jpg", "jpeg", "png", "image", "img")


class MdsImages:
    """A source whose parts are the shards of an MDS dataset."""

    attribution = ""

    def __init__(self, root: str | os.PathLike, *, cache: str | None = None):
        """Raises UserError where the dataset has no column of images or none of captions."""
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
                f"{root}, found {columns}"
            )
        self._image, self._caption = (*images, "")[0], (*captions, "")[0]
        self.parts = [shard.raw.name for shard in self._reader.shards]

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one shard."""
        start = sum(shard.samples for shard in self._reader.shards[:part])
        for index in range(start, start + self._reader.shards[part].samples):
            try:
                raw = self._reader.raw(index)
                decode = mds_encodings.parse(self._reader.columns[self._caption]).decode
                caption = str(decode(raw[self._caption]))
            except (UserError, ValueError) as error:
                yield skipped_image(str(index), f"damaged sample: {error}")
                continue
            decode = mds_encodings.parse(self._reader.columns[self._image]).decode
            yield SourceImage(
                str(index), caption, lambda decode=decode, data=raw[self._image]: decode(data)
            )
