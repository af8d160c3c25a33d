"""Picture files of any kind to square pictures, resized and cropped as the reference does it."""

import io
import warnings

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

# Of one picture, 300 MB decoded; a larger one is refused before it is decoded.
MAX_PIXELS = 100_000_000


def decode(file: bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture file as RGB: grey and CMYK converted, alpha over white, of animations the first.

    The reference drops alpha instead, which shows what was meant to be hidden; its data have none.
    Like there, the camera's orientation is not applied.

    Raises:
      ValueError: no picture, a damaged or an enormous one; the message is a short reason.
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
        raise ValueError("not a picture") from error
    except Exception as error:  # Pillow lets through whatever its decoders meet in broken files
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
    """The middle square of an RGB picture, its shorter side resized to `resolution` pixels.

    Equal, bit for bit, to torchvision's Resize (bicubic) and CenterCrop on PIL images.

    Raises:
      ValueError: so long a strip that resizing it would take more memory than `MAX_PIXELS`.
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
    """Bytes to [-1, 1], with torchvision's own steps, so that no bit differs."""
    return (images.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
