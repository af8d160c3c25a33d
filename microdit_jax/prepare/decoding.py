"""Image files to square crops and clean captions, by threads, in the source's order."""

import collections
import contextlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from microdit_jax.errors import visible
from microdit_jax.files.image_files import MAX_PIXELS
from microdit_jax.prepare import captions
from microdit_jax.prepare.options import PrepareOptions
from microdit_jax.prepare.pixels import Refused, opened, resize_and_crop, to_rgb
from microdit_jax.prepare.sources.listed_images import ImageSource, SourceImage

# The tag of the camera's orientation (EXIF 2.3, 4.6.4), and what makes each upright
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bytes of undecoded files that wait for a thread.
_MAX_WAITING = 1 << 30


class PixelLimit:
    """Bounds the pixels that all threads decode at once, since each takes up to 23 bytes."""

    def __init__(self, most: int = MAX_PIXELS):
        self._most, self._held = most, 0
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Waits until there is room for an image; one that is larger than all room is alone."""
        with self._turn, self._changed:  # in turn, so that small images do not overtake a large one
            self._changed.wait_for(lambda: not self._held or self._held + pixels <= self._most)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify()


# ------------------------------------------------------------------ all images of a source
class DecodedImage(NamedTuple):
    """An image ready to be encoded, or the reason why it is skipped.

    Attributes:
      crops: bytes (side, side, 3) at each resolution.
    """

    id: str
    caption: str
    crops: tuple[UInt8[np.ndarray, "h w 3"], ...]
    skip_reason: str | None = None


def decode_parts(
    source: ImageSource,
    parts: Iterable[int],
    options: PrepareOptions,
    pool: ThreadPoolExecutor,
    *,
    ahead: int,
) -> Iterator[tuple[int, DecodedImage | None]]:
    """Yields the number of a part and one of its images, in order; None ends a part.

    Args:
      ahead: images that the pool decodes before they are asked for.
    """
    waiting: collections.deque[tuple[int, Future[DecodedImage] | None, int]] = collections.deque()
    limit, held = PixelLimit(), 0

    def ready(count: int) -> Iterator[tuple[int, DecodedImage | None]]:
        nonlocal held
        while len(waiting) > count or (waiting and held > _MAX_WAITING):
            number, future, num_bytes = waiting.popleft()
            held -= num_bytes
            yield number, None if future is None else future.result()

    for number in parts:
        seen = set()
        for image in source.read(number):
            # Lone surrogates, of file names that are not UTF-8, could not be written.
            image = image._replace(id=image.id.encode(errors="backslashreplace").decode())
            if image.id in seen and image.skip_reason is None:
                image = image._replace(skip_reason="duplicate id")
            seen.add(image.id)
            waiting.append(
                (number, pool.submit(_decode_one, image, options, limit), image.num_bytes)
            )
            held += image.num_bytes
            yield from ready(ahead)
        waiting.append((number, None, 0))
    yield from ready(0)


def _decode_one(image: SourceImage, options: PrepareOptions, limit: PixelLimit) -> DecodedImage:
    """Decodes an image and cleans its caption; whatever is wrong with them is a reason."""
    try:
        if image.skip_reason is not None:
            raise Refused(image.skip_reason)
        caption = _usable_caption(image.caption, options)
        crops = _crops(_load(image), options, limit)
        return DecodedImage(image.id, caption, crops)
    except OSError as error:
        reason = f"cannot be read ({error.strerror or type(error).__name__})"
    except ValueError as error:
        reason = str(error)
    return DecodedImage(image.id, "", (), visible(reason, 200))


def _usable_caption(caption: str | None, options: PrepareOptions) -> str:
    """Returns the caption as it is stored; raises ValueError, with a short reason, for none."""
    if caption is None:
        raise Refused("no caption")
    if len(caption) > captions.MAX_LENGTH:
        raise Refused(f"a caption of {len(caption):,} characters")
    try:
        caption = captions.clean(caption) if options.clean else caption
        caption.encode()
    except Exception as error:  # a stranger's text: what parses HTML has no error of its own
        raise ValueError(f"the caption cannot be cleaned ({type(error).__name__})") from error
    if not caption.strip():
        raise Refused("empty caption")
    return caption


def _crops(
    file: bytes | Image.Image, options: PrepareOptions, limit: PixelLimit
) -> tuple[UInt8[np.ndarray, "h w 3"], ...]:
    with opened(file) as image, limit.hold(image.width * image.height):
        image.load()
        turn = _TURNS.get(_orientation(image)) if options.exif else None
        image = to_rgb(image)
        if turn is not None:
            image = image.transpose(turn)
        if min(image.size) < options.min_size:
            raise Refused(f"smaller than {options.min_size} pixels")
        return tuple(resize_and_crop(image, side) for side in options.resolutions)


def _orientation(image: Image.Image) -> int:
    """Returns how the camera was held, 1 to 8; 1 where that is not told, or damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # an image whose pixels are whole is used
        return 1


def _load(image: SourceImage) -> bytes | Image.Image:
    try:
        return image.load()
    except (OSError, ValueError):
        raise
    except Exception as error:  # modes and types that Pillow lacks, memory, recursion, ...
        raise ValueError(f"cannot be decoded ({type(error).__name__})") from error
