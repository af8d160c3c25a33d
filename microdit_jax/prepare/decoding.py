"""Image files to square crops and clean captions, by threads, in the source's order."""

import collections
import io
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from microdit_jax.prepare import captions
from microdit_jax.prepare.options import PrepareOptions
from microdit_jax.prepare.sources.listed_images import ImageSource, SourceImage

# 300 MB for one image in memory; a larger one is refused before it is decoded.
MAX_PIXELS = 100_000_000


# ------------------------------------------------------------------ one image
def decode(file: bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file to RGB: grey and CMYK converted, alpha over white, the first frame.

    The reference drops alpha instead, which shows what was meant to be hidden; its data have none.
    As in the reference, the camera's orientation is not applied.

    Raises:
      ValueError: no image, a damaged or an enormous one; the message is a short reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, and sizes, which are checked here
            image = Image.open(io.BytesIO(file)) if isinstance(file, bytes) else file
            if image.width * image.height > max_pixels:
                raise _Refused(f"more than {max_pixels // 10**6} megapixels")
            image.load()
            return _to_rgb(image)
    except _Refused:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"more than {max_pixels // 10**6} megapixels") from error
    except MemoryError as error:
        raise ValueError("not enough memory") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except Exception as error:  # Pillow passes on any exception that its decoders raise
        raise ValueError(f"cannot be decoded ({type(error).__name__})") from error


class _Refused(ValueError):
    pass


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
        raise ValueError(f"a strip of {width}x{height} pixels")
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
    waiting: collections.deque[tuple[int, Future[DecodedImage] | None]] = collections.deque()

    def ready(count: int) -> Iterator[tuple[int, DecodedImage | None]]:
        while len(waiting) > count:
            number, future = waiting.popleft()
            yield number, None if future is None else future.result()

    for number in parts:
        seen = set()
        for image in source.read(number):
            if image.id in seen and image.skip_reason is None:
                image = image._replace(skip_reason="duplicate id")
            seen.add(image.id)
            waiting.append((number, pool.submit(_decode_one, image, options)))
            yield from ready(ahead)
        waiting.append((number, None))
    yield from ready(0)


def _decode_one(source_image: SourceImage, options: PrepareOptions) -> DecodedImage:
    def skipped(reason: str) -> DecodedImage:
        return DecodedImage(source_image.id, "", (), reason)

    if source_image.skip_reason is not None:
        return skipped(source_image.skip_reason)
    if source_image.caption is None:
        return skipped("no caption")
    caption = source_image.caption
    caption = captions.clean(caption) if options.clean else caption
    if not caption.strip():
        return skipped("empty caption")
    try:
        image = decode(_load(source_image))
        if min(image.size) < options.min_size:
            return skipped(f"smaller than {options.min_size} pixels")
        crops = [resize_and_crop(image, side) for side in options.resolutions]
    except OSError as error:
        return skipped(f"cannot be read ({error.strerror or type(error).__name__})")
    except ValueError as error:
        return skipped(str(error))
    return DecodedImage(source_image.id, caption, tuple(crops))


def _load(image: SourceImage) -> bytes | Image.Image:
    try:
        return image.load()
    except (LookupError, TypeError, ArithmeticError) as error:  # modes and types Pillow lacks
        raise ValueError(f"cannot be decoded ({type(error).__name__})") from error
