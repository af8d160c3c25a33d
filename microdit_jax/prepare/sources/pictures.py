"""Captioned pictures as precompute reads them: parts that can be read alone, in a fixed order."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_PART = 1000  # pictures, where files come one by one


class Picture(NamedTuple):
    """One picture of a source.

    id: unique in its dataset. caption: None where there is none. load: gives the file's bytes, or
    the picture; may raise OSError, or ValueError and its kin. reason: why the picture is unusable,
    else None.
    """

    id: str
    caption: str | None
    load: Callable[[], bytes | Image.Image] | None
    reason: str | None = None


def unusable(id: str, reason: str) -> Picture:
    """A picture that is counted and listed, but not read."""
    return Picture(id, None, None, reason)


@runtime_checkable
class Pictures(Protocol):
    """A source: `parts` names, and the pictures of each.

    The names, and the pictures of a part, are the same in every process and every run.
    """

    parts: Sequence[str]
    attribution: str

    def read(self, part: int) -> Iterator[Picture]:
        """The pictures of the part with this number."""
        ...


class ListedPictures:
    """A source of single files that are listed beforehand."""

    def __init__(self, pictures: Sequence[Picture], attribution: str = ""):
        self._pictures = list(pictures)
        count = math.ceil(len(self._pictures) / _PART)
        self.parts = [f"pictures {i * _PART} to {(i + 1) * _PART - 1}" for i in range(count)]
        self.attribution = attribution

    def read(self, part: int) -> Iterator[Picture]:
        """The pictures of one part."""
        yield from self._pictures[part * _PART : (part + 1) * _PART]


class Fraction:
    """Evenly spaced parts of a source, for a trial; at least one."""

    def __init__(self, source: Pictures, fraction: float):
        count = len(source.parts)
        kept = min(count, max(1, round(count * fraction)))
        self._source, self._chosen = source, [i * count // kept for i in range(kept)]
        self.parts = [source.parts[i] for i in self._chosen]
        self.attribution = source.attribution

    def read(self, part: int) -> Iterator[Picture]:
        """The pictures of one of the chosen parts."""
        yield from self._source.read(self._chosen[part])


def picture_file(id: str, caption: str | None, path: Path) -> Picture:
    """A picture in a file of its own."""
    return Picture(id, caption, path.read_bytes)
