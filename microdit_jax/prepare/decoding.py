"""From pictures of a source to squares of bytes and clean captions, by threads, in order."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from microdit_jax.errors import UserError
from microdit_jax.prepare import captions, cropping
from microdit_jax.prepare.sources.pictures import Picture, Pictures


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the records, beside the source and the towers.

    resolutions: pixels of a side. min_size: pictures with a shorter side are left out.
    clean: clean the captions. caption_store: "embeddings", "tokens" or "both".
    batch: pictures that a device encodes at a time.
    """

    resolutions: tuple[int, ...]
    min_size: int
    seed: int
    batch: int
    clean: bool = True
    caption_store: str = "embeddings"

    def __post_init__(self):
        if (
            not self.resolutions
            or min(self.resolutions) < 8
            or any(side % 8 for side in self.resolutions)
        ):
            found = ", ".join(map(str, self.resolutions))
            raise UserError(f"--resolutions must be multiples of 8, found {found}")
        if len(set(self.resolutions)) != len(self.resolutions):
            raise UserError(f"--resolutions must differ, found {self.resolutions}")
        if self.caption_store not in ("embeddings", "tokens", "both"):
            raise UserError(
                f"--captions_as must be embeddings, tokens or both, found {self.caption_store!r}"
            )
        for name, least in (("batch", 1), ("min_size", 0), ("seed", 0)):
            if (found := getattr(self, name)) < least:
                raise UserError(f"--{name} must be at least {least}, found {found}")


class Prepared(NamedTuple):
    """A picture ready to be encoded: bytes (side, side, 3) of each resolution; or why not."""

    id: str
    caption: str
    squares: tuple[np.ndarray, ...]
    reason: str | None = None


def prepare(
    source: Pictures,
    parts: Iterable[int],
    settings: Settings,
    pool: ThreadPoolExecutor,
    *,
    ahead: int,
) -> Iterator[tuple[int, Prepared | None]]:
    """The pictures of the parts in order, `ahead` of them decoded beforehand; None ends a part."""
    waiting: collections.deque = collections.deque()

    def ready(count: int) -> Iterator[tuple[int, Prepared | None]]:
        while len(waiting) > count:
            number, future = waiting.popleft()
            yield number, None if future is None else future.result()

    for number in parts:
        seen = set()
        for picture in source.read(number):
            if picture.id in seen and picture.reason is None:
                picture = picture._replace(reason="duplicate id")
            seen.add(picture.id)
            waiting.append((number, pool.submit(_prepare_one, picture, settings)))
            yield from ready(ahead)
        waiting.append((number, None))
    yield from ready(0)


def _prepare_one(picture: Picture, settings: Settings) -> Prepared:
    def left_out(reason: str) -> Prepared:
        return Prepared(picture.id, "", (), reason)

    if picture.reason is not None:
        return left_out(picture.reason)
    if picture.caption is None:
        return left_out("no caption")
    caption = captions.clean(picture.caption) if settings.clean else picture.caption
    if not caption.strip():
        return left_out("empty caption")
    try:
        image = cropping.decode(_load(picture))
        if min(image.size) < settings.min_size:
            return left_out(f"smaller than {settings.min_size} pixels")
        squares = [cropping.resize_and_crop(image, side) for side in settings.resolutions]
    except OSError as error:
        return left_out(f"cannot be read ({error.strerror or type(error).__name__})")
    except ValueError as error:
        return left_out(str(error))
    return Prepared(picture.id, caption, tuple(squares))


def _load(picture: Picture) -> bytes | Image.Image:
    try:
        return picture.load()
    except (LookupError, TypeError, ArithmeticError) as error:  # modes and types Pillow has not
        raise ValueError(f"cannot be decoded ({type(error).__name__})") from error
