"""One image file of any origin to RGB pixels, and to a square crop."""

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from microdit_jax.files.image_files import MAX_PIXELS, UnusableImage, check_pixels, open_image


def decode(file: bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file to RGB: grey and CMYK converted, alpha over white, the first frame.

    The reference drops alpha instead, which shows what was meant to be hidden; its data have none.
    Raises:
      ValueError: no image, a damaged or an enormous one; the message is a short reason.
    """
    with opened(file, max_pixels) as image:
        image.load()
        return to_rgb(image)


@contextlib.contextmanager
def opened(file: bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
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
    except (UnusableImage, Refused):
        raise
    except MemoryError as error:
        raise ValueError("not enough memory") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except Exception as error:  # Pillow passes on any exception that its decoders raise
        raise ValueError(f"cannot be decoded ({type(error).__name__})") from error


class Refused(ValueError):
    """An image that is not wanted; the message is a short reason."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any kind of pixels: grey and CMYK too, alpha over white."""
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow would cut them off at 255
        grey = np.clip(np.asarray(image, np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise Refused("floating point pixels, whose range is not known")
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
        raise Refused(f"a strip of {width}x{height} pixels")
    # Resizing the middle alone would be quicker, but rounds differently
    left, top = (int(round((side - resolution) / 2)) for side in size)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + resolution, top + resolution)))


def to_float(images: UInt8[np.ndarray, "*n h w 3"]) -> Float32[np.ndarray, "*n h w 3"]:
    """Converts bytes to [-1, 1] with torchvision's own steps, so that no bit differs."""
    return (images.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
