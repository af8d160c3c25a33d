"""Captioned images as `prepare` reads them: parts that can be read alone, in a fixed order."""

import abc
import collections
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image

from microdit_jax.errors import UserError
from microdit_jax.files import inside, open_regular, read_at_most
from microdit_jax.files.image_files import FORMATS, MAX_BYTES

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SUFFIXES |= {".avif"} if "AVIF" in FORMATS else set()
# Images that are counted and listed, but not read
UNREAD_SUFFIXES = {".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".eps", ".ico", ".dng", ".cr2"}
UNREAD_SUFFIXES |= {".avif", ".nef", ".arw", ".ppm", ".tga"} - SUFFIXES
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

    @property
    def part_size(self) -> int:
        """Number of keys of `listing` that make a new part."""
        ...

    def listing(self, part: int) -> dict[str, str]:
        """Returns what a part is listed to hold: keys, unique in the source, with fingerprints."""
        ...

    def regrouped(self, parts: Sequence[Sequence[str]]) -> "ImageSource":
        """Returns a source of the same images, with parts of these keys."""
        ...

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of the part with this number."""
        ...


class ListedImages:
    """A source of single files that are listed beforehand."""

    notes = ()
    part_size = _PART

    def __init__(
        self,
        images: Sequence[SourceImage],
        attribution: str = "",
        *,
        sizes: Sequence[int] | None = None,
    ):
        """
        Args:
          sizes: number of images of each part, by default 1,000.
        """
        self._images = list(images)
        count = len(self._images)
        sizes = [min(_PART, count - i) for i in range(0, count, _PART)] if sizes is None else sizes
        self._starts = [0, *itertools.accumulate(sizes)]
        ranges = itertools.pairwise(self._starts)
        # A part's name tells how many it may hold, so that a shorter last one is named as before
        self.parts = [
            f"images {i} to {max(j, i + _PART if j == count else j) - 1}" for i, j in ranges
        ]
        self.attribution = attribution

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one part."""
        yield from self._images[self._starts[part] : self._starts[part + 1]]

    @functools.cached_property
    def _keys(self) -> list[str]:
        """Ids, made unique: those that are met again are skipped, but listed."""
        seen = collections.Counter[str]()
        keys = []
        for image in self._images:
            seen[image.id] += 1
            again = seen[image.id]
            key = image.id if again == 1 else f"{image.id} (again, {again - 1})"
            keys.append(key.encode(errors="backslashreplace").decode())
        return keys

    def listing(self, part: int) -> dict[str, str]:
        """Returns the ids of a part, with a hash of each caption."""
        here = slice(self._starts[part], self._starts[part + 1])
        texts = (f"{image.caption}/{image.skip_reason}" for image in self._images[here])
        hashes = (hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12] for text in texts)
        return dict(zip(self._keys[here], hashes, strict=True))

    def regrouped(self, parts: Sequence[Sequence[str]]) -> "ListedImages":
        """Returns the images in the order of these ids."""
        by_key = dict(zip(self._keys, self._images, strict=True))
        images = [by_key[key] for part in parts for key in part]
        return ListedImages(images, self.attribution, sizes=[len(part) for part in parts])


class WholeParts(abc.ABC):
    """A source whose parts are files, or pieces of files, that come and go as a whole."""

    notes: Sequence[str] = ()
    attribution = ""
    part_size = 1
    parts: Sequence[str]

    @abc.abstractmethod
    def fingerprint(self, part: int) -> str:
        """Returns a text that differs for other contents, without reading them."""

    @abc.abstractmethod
    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of the part with this number."""

    def listing(self, part: int) -> dict[str, str]:
        """Returns the part's name with its fingerprint."""
        return {self.parts[part]: self.fingerprint(part)}

    def regrouped(self, parts: Sequence[Sequence[str]]) -> ImageSource:
        """Returns the parts in another order."""
        numbers = {name: number for number, name in enumerate(self.parts)}
        return ChosenParts(self, [numbers[name] for part in parts for name in part])


class ChosenParts:
    """Some parts of a source, in any order."""

    def __init__(self, source: ImageSource, chosen: Sequence[int]):
        self._source, self._chosen = source, list(chosen)
        self.parts = [source.parts[i] for i in self._chosen]
        self.attribution, self.notes = source.attribution, source.notes
        self.part_size = source.part_size

    def listing(self, part: int) -> dict[str, str]:
        """Returns what one of the chosen parts is listed to hold."""
        return self._source.listing(self._chosen[part])

    def regrouped(self, parts: Sequence[Sequence[str]]) -> ImageSource:
        """Returns a source of these keys, of all parts."""
        return self._source.regrouped(parts)

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one of the chosen parts."""
        yield from self._source.read(self._chosen[part])


class Fraction(ChosenParts):
    """Evenly spaced parts of a source, for a trial; at least one."""

    def __init__(self, source: ImageSource, fraction: float):
        count = len(source.parts)
        kept = min(count, max(1, round(count * fraction)))
        super().__init__(source, [i * count // kept for i in range(kept)])
