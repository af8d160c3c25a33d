"""Captioned images as `prepare` reads them: parts that can be read alone, in a fixed order."""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image

from microdit_jax.errors import UserError
from microdit_jax.files import inside, open_regular, read_at_most
from microdit_jax.files.image_files import MAX_BYTES

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_PART = 1000  # images, where files come one by one


def _nothing() -> bytes:
    raise ValueError("a skipped image has no file")


class SourceImage(NamedTuple):
    """One image of a source, not decoded yet.

    Attributes:
      id: unique in its dataset.
      caption: None where there is none.
      load: gives the file's bytes, or the image; may raise OSError, or ValueError and its kin.
      skip_reason: why the image is not usable, else None.
      num_bytes: memory that `load` keeps until it is called, for images of archives.
    """

    id: str
    caption: str | None
    load: Callable[[], bytes | Image.Image]
    skip_reason: str | None = None
    num_bytes: int = 0


def skipped_image(id: str, reason: str) -> SourceImage:
    """Returns an image that is counted and listed, but not read."""
    return SourceImage(id, None, _nothing, reason)


def image_file(id: str, caption: str | None, path: Path) -> SourceImage:
    """Returns an image in a file of its own, which comes from an installed package."""
    return SourceImage(id, caption, path.read_bytes)


def image_below(id: str, caption: str | None, root: Path, name: str) -> SourceImage:
    """Returns an image in a file of its own; one that lies outside of the folder is skipped."""
    return SourceImage(id, caption, functools.partial(read_below, root, name, MAX_BYTES))


def read_below(root: Path, name: str, num_bytes: int) -> bytes:
    """Reads a file below a folder whole.

    Raises:
      OSError: the file cannot be opened.
      ValueError: it lies outside, by a link too, is no regular file, or is too large; the message
        is a short reason.
    """
    try:
        path = inside(root, name)
    except UserError as error:
        raise ValueError("outside of the folder") from error
    try:
        file = open_regular(path)
    except UserError as error:
        raise ValueError("not a regular file") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        if size > num_bytes:
            raise ValueError(f"a file of {size} bytes")
        return read_at_most(file, num_bytes, path)


@runtime_checkable
class ImageSource(Protocol):
    """A dataset of captioned images: names of its parts, and the images of each.

    The names, and the images of a part, are the same in every process and every run.
    """

    @property
    def parts(self) -> Sequence[str]:
        """Names of the parts."""
        ...

    @property
    def attribution(self) -> str:
        """Text that the licence of the images wants shown, "" if none."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Lines to print before the work: what was found by itself."""
        ...

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of the part with this number."""
        ...


class ListedImages:
    """A source of single files that are listed beforehand."""

    notes = ()

    def __init__(self, images: Sequence[SourceImage], attribution: str = ""):
        self._images = list(images)
        count = math.ceil(len(self._images) / _PART)
        self.parts = [f"images {i * _PART} to {(i + 1) * _PART - 1}" for i in range(count)]
        self.attribution = attribution

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one part."""
        yield from self._images[part * _PART : (part + 1) * _PART]


class Fraction:
    """Evenly spaced parts of a source, for a trial; at least one."""

    def __init__(self, source: ImageSource, fraction: float):
        count = len(source.parts)
        kept = min(count, max(1, round(count * fraction)))
        self._source, self._chosen = source, [i * count // kept for i in range(kept)]
        self.parts = [source.parts[i] for i in self._chosen]
        self.attribution, self.notes = source.attribution, source.notes

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one of the chosen parts."""
        yield from self._source.read(self._chosen[part])
