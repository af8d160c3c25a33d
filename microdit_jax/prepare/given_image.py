"""An image to be changed, and its mask: files of any origin, by the decoder of datasets."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from microdit_jax.errors import UserError, visible
from microdit_jax.files.image_files import MAX_BYTES, MAX_PIXELS
from microdit_jax.files.reading import read_bytes
from microdit_jax.prepare.pixels import decode

if TYPE_CHECKING:
    from microdit_jax.images import ImageSettings


class GivenImage(NamedTuple):
    """Decoded files, each None where there is none.

    Attributes:
      checksums: the fields of `images.ImageSettings` that hold the files' sha256.
    """

    image: Image.Image | None
    mask: Image.Image | None
    checksums: dict[str, str | None]


def given_image(
    image: str | None, mask: str | None, again: "ImageSettings | None" = None
) -> GivenImage:
    """Reads and decodes the files.

    Args:
      again: settings of an image that is sampled again; its files must be as they were.
    Raises:
      UserError: a file that is not there, is no image, or is another than before; a mask alone.
    """
    decoded: dict[str, Image.Image | None] = {}
    checksums: dict[str, str | None] = {}
    for name, path in (("image", image), ("mask", mask)):
        decoded[name] = checksums[f"{name}_sha256"] = None
        if path is None:
            continue
        before = None if again is None else getattr(again, f"{name}_sha256")
        from_settings = again is not None and getattr(again, name) == path
        if from_settings and ("://" in path or before is None):
            raise UserError(
                f"expected a file of this machine as the {name} that an image was made from, found "
                f"{visible(path)}; if you trust it, give a copy by --{name}"
            )
        data = _read(path, name)
        checksums[f"{name}_sha256"] = found = hashlib.sha256(data).hexdigest()
        if from_settings and before != found:
            raise UserError(
                f"expected {visible(path)} as it was when the image was made, found another file; "
                f"give the first one by --{name}"
            )
        decoded[name] = decoded_image(data, f"--{name}={visible(path)}")
    return GivenImage(decoded["image"], decoded["mask"], checksums)


def decoded_image(data: bytes, what: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file's bytes to RGB.

    Args:
      what: the file, for errors.
      max_pixels: a larger image is refused.
    Raises:
      UserError: no image, a damaged or an enormous one.
    """
    try:
        return decode(data, max_pixels)
    except ValueError as error:
        raise UserError(f"expected an image in {what}, found {error}") from error


def _read(path: str, name: str) -> bytes:
    try:
        return read_bytes(Path(path), MAX_BYTES)
    except OSError as error:
        raise UserError(
            f"expected an image at --{name}={visible(path)}, found "
            f"{visible(error.strerror or error, 200)}"
        ) from error
