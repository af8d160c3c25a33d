"""The emoji pictures that come with pip (see twemoji), as a source for precompute."""

import numpy as np

from microdit_jax.data.sources import twemoji
from microdit_jax.data.sources.pictures import ListedPictures, picture_file
from microdit_jax.errors import UserError


def open_pictures(split: str = "train") -> ListedPictures:
    """The pictures of "train", or of "heldout", whose captions training never sees."""
    if split not in ("train", "heldout"):
        raise UserError(f"the emoji set has the splits train and heldout, found {split!r}")
    pictures = twemoji.list_pictures()
    heldout = twemoji.heldout_mask([picture.caption for picture in pictures])
    chosen = np.flatnonzero(heldout == (split == "heldout"))
    return ListedPictures(
        [
            picture_file(pictures[i].path.stem, pictures[i].caption, pictures[i].path)
            for i in chosen
        ],
        twemoji.ATTRIBUTION,
    )
