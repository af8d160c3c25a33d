"""The emoji pictures that come with pip (see twemoji), as a source for precompute."""

from microdit_jax.data import twemoji
from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.pictures import ListedPictures, picture_file


def open_pictures(split: str = "train") -> ListedPictures:
    """The pictures of "train", or of "heldout", whose captions training never sees."""
    if split not in ("train", "heldout"):
        raise UserError(f"the emoji set has the splits train and heldout, found {split!r}")
    return ListedPictures(
        [picture_file(p.path.stem, p.caption, p.path) for p in twemoji.pictures_of(split)],
        twemoji.ATTRIBUTION,
    )
