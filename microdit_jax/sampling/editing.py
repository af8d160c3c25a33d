"""Given images for image-to-image and inpainting: fitted to the model's size, and their masks."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from microdit_jax.errors import UserError
from microdit_jax.towers import Codec

WHITE = 128  # grey from which on a mask's pixel is to be made anew
MOST_PIXELS = 100_000_000  # of an image after it is resized, which a long strip may exceed


class Edit(NamedTuple):
    """A given image as a sampler takes it.

    Attributes:
      latents: (h, w, channels), scaled.
      free: (h, w, 1), 1 where the image is changed; None: everywhere.
    """

    latents: Float32[np.ndarray, "h w c"]
    free: Float32[np.ndarray, "h w 1"] | None


def make_edit(codec: Codec, side: int, image: Any, mask: Any | None = None) -> Edit:
    """Fits an image to the model, encodes it, and finds the latents that a mask frees.

    Args:
      side: pixels of a side of the model's images.
      image: a PIL image, or an array (H, W, 3) of bytes or of floats in [0, 1]; of any size: the
        shorter side is resized to `side`, and the middle square taken.
      mask: a PIL image or an array (H, W) or (H, W, 3) of the image's own size, white (True, 1)
        where the image is to be made anew. A latent is free if any of its pixels is white.
    Raises:
      UserError: a mask of another size, or that is all black or all white; no image.
    """
    given = _opened(image, "image").convert("RGB")
    pixels = np.asarray(fitted(given, side, Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    latents = codec.encode(pixels[None])[0] * np.float32(codec.scaling_factor)
    return Edit(latents, None if mask is None else _free(codec, side, given.size, mask))


def _free(
    codec: Codec, side: int, size: tuple[int, int], mask: Any
) -> Float32[np.ndarray, "h w 1"]:
    cover = _opened(mask, "mask").convert("L")
    if cover.size != size:
        raise UserError(
            f"expected a mask of the image's size, {size[0]}x{size[1]}, found "
            f"{cover.width}x{cover.height}"
        )
    white: Bool[np.ndarray, "H W"] = np.asarray(cover) >= WHITE
    kept = np.asarray(fitted(Image.fromarray(white), side, Image.Resampling.NEAREST))
    p = codec.pixels_per_latent
    # (H, W) -> (h, p, w, p) -> (h, w)
    free = np.asarray(kept.reshape(side // p, p, side // p, p).any(axis=(1, 3)))
    if free.all() or not free.any():
        raise UserError(
            "expected a mask with white, where the image is to be made anew, and black, found one "
            f"that is all {'white' if free.all() else 'black'}"
            + ("" if white.all() or not white.any() else " in the square that the model takes")
            + ("; leave it out to change the whole image" if free.all() else "")
        )
    return free[..., None].astype(np.float32)


def fitted(image: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
    """Resizes the shorter side to `side` pixels, and crops the middle square."""
    scale = side / min(image.size)
    width, height = (max(side, round(scale * length)) for length in image.size)
    if width * height > MOST_PIXELS:
        raise UserError(f"expected an image, found a strip of {image.width}x{image.height} pixels")
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), resampling).crop((left, top, left + side, top + side))


def _opened(image: Any, name: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    found = np.asarray(image)
    if found.ndim not in (2, 3) or 0 in found.shape or found.ndim == 3 and found.shape[2] != 3:
        raise UserError(f"expected the {name} as an array (H, W, 3), found {found.shape}")
    if found.dtype == bool:
        found = found.astype(np.float32)
    if np.issubdtype(found.dtype, np.floating):
        if not np.isfinite(found).all() or found.min() < 0 or found.max() > 1:
            raise UserError(f"expected the {name} as bytes or floats in [0, 1], found others")
        found = np.round(found * 255).astype(np.uint8)
    if found.dtype != np.uint8:
        raise UserError(f"expected the {name} as bytes or floats in [0, 1], found {found.dtype}")
    pixels: UInt8[np.ndarray, "..."] = found
    return Image.fromarray(pixels)
