"""Image files to square crops and clean captions, by threads, in the source's order."""

import collections
import contextlib
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from microdit_jax.errors import visible
from microdit_jax.files.image_files import MAX_PIXELS, UnusableImage, check_pixels, open_image
from microdit_jax.prepare import captions
from microdit_jax.prepare.options import PrepareOptions
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


# ------------------------------------------------------------------ one image
def decode(file: bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file to RGB: grey and CMYK converted, alpha over white, the first frame.

    The reference drops alpha instead, which shows what was meant to be hidden; its data have none.
    Raises:
      ValueError: no image, a damaged or an enormous one; the message is a short reason.
    """
    with _opened(file, max_pixels) as image:
        image.load()
        return _to_rgb(image)


@contextlib.contextmanager
def _opened(file: bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Opens an image whose pixels are decoded at the first use; errors there are short reasons."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, and sizes, which are checked here
            if isinstance(file, bytes):
                with open_image(file, max_pixels=max_pixels) as image:
                    yield image
            else:
                check_pixels(file, max_pixels)
                yield file
    except (UnusableImage, _Refused):
        raise
    except MemoryError as error:
        raise ValueError("not enough memory") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except Exception as error:  # Pillow passes on any exception that its decoders raise
        raise ValueError(f"cannot be decoded ({type(error).__name__})") from error


class _Refused(ValueError):
    """An image that is not wanted; the message is a short reason."""


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow would cut them off at 255
        grey = np.clip(np.asarray(image, np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise _Refused("floating point pixels, whose range is not known")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, resolution: int) -> UInt8[np.ndarray, "h w 3"]:
    """Resizes the shorter side of an RGB image to `resolution` pixels and crops the middle square.

    Equal, bit for bit, to torchvision's Resize (bicubic) and CenterCrop on PIL images.

    Raises:
      ValueError: a strip so long that resizing it would take more memory than `MAX_PIXELS`.
    """
    width, height = image.size
    if width < height:
        size = resolution, max(resolution, int(resolution * height / width))
    else:
        size = max(resolution, int(resolution * width / height)), resolution
    if size[0] * size[1] > MAX_PIXELS:
        raise _Refused(f"a strip of {width}x{height} pixels")
    # Resizing the middle alone would be quicker, but rounds differently
    left, top = (int(round((side - resolution) / 2)) for side in size)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + resolution, top + resolution)))


def to_float(images: UInt8[np.ndarray, "*n h w 3"]) -> Float32[np.ndarray, "*n h w 3"]:
    """Converts bytes to [-1, 1] with torchvision's own steps, so that no bit differs."""
    return (images.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


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
            raise _Refused(image.skip_reason)
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
        raise _Refused("no caption")
    if len(caption) > captions.MAX_LENGTH:
        raise _Refused(f"a caption of {len(caption):,} characters")
    try:
        caption = captions.clean(caption) if options.clean else caption
        caption.encode()
    except Exception as error:  # a stranger's text: what parses HTML has no error of its own
        raise ValueError(f"the caption cannot be cleaned ({type(error).__name__})") from error
    if not caption.strip():
        raise _Refused("empty caption")
    return caption


def _crops(
    file: bytes | Image.Image, options: PrepareOptions, limit: PixelLimit
) -> tuple[UInt8[np.ndarray, "h w 3"], ...]:
    with _opened(file) as image, limit.hold(image.width * image.height):
        image.load()
        turn = _TURNS.get(_orientation(image)) if options.exif else None
        image = _to_rgb(image)
        if turn is not None:
            image = image.transpose(turn)
        if min(image.size) < options.min_size:
            raise _Refused(f"smaller than {options.min_size} pixels")
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
