"""Emoji images that come with pip (see `data.twemoji`), as a source for `prepare`."""

from microdit_jax.data import twemoji
from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.listed_images import ListedImages, image_file


def open_images(split: str = "train") -> ListedImages:
    """Opens the images of "train", or of "heldout", whose captions training never sees."""
    if split not in twemoji.SPLITS:
        raise UserError(f"the emoji set has the splits train and heldout, found {split!r}")
    listed = twemoji.images_of(split)
    return ListedImages(
        [image_file(image.path.stem, image.caption, image.path) for image in listed],
        twemoji.ATTRIBUTION,
    )
