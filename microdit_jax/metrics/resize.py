"""Resizes images to the FID network's 299 x 299 pixels and input range, in three ways.

Parmar et al. 2022 (arXiv:2104.11222): FID moves by whole points with the resizing. "clean" is
clean-fid's; "pytorch_fid" and "torch_fidelity" are the two older packages' (clean-fid calls them
legacy_pytorch and legacy_tensorflow). Statistics of one mode do not go with another's.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from microdit_jax.errors import UserError

MODES = ("clean", "pytorch_fid", "torch_fidelity")
SIDE = 299
# Bytes become (x - middle) / middle, in about [-1, 1]; 128 is TensorFlow's.
_MIDDLE = {"clean": 128.0, "pytorch_fid": 127.5, "torch_fidelity": 128.0}


def resize(
    image: UInt8[np.ndarray, "H W 3"], mode: str = "clean", *, height: int = SIDE, width: int = SIDE
) -> Float32[np.ndarray, "{height} {width} 3"]:
    """Resizes a uint8 image (H, W, 3), without rounding: float32 in [0, 255].

    "clean" is Pillow's antialiased bicubic filter on each colour as floats. The other two are
    bilinear without antialiasing, and differ in the positions of the pixels' centres.

    Raises:
      UserError: an unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"resizing must be one of {', '.join(MODES)}, found {mode!r}")
    if mode == "clean":
        colours = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
        resized = [np.asarray(c.resize((width, height), Image.Resampling.BICUBIC)) for c in colours]
        return np.clip(np.stack(resized, axis=-1), 0, 255)
    half = 0.5 if mode == "pytorch_fid" else 0.0  # centres at i + 1/2, or at i
    x = image.astype(np.float32)
    low, high, part = _two(image.shape[1], width, half)
    x = x[:, low] + part[None, :, None] * (x[:, high] - x[:, low])  # H width 3
    low, high, part = _two(image.shape[0], height, half)
    return x[low] + part[:, None, None] * (x[high] - x[low])  # height width 3


def _two(old: int, new: int, half: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the two old pixels around each new one, and its distance from the first."""
    # torch computes this in float32 with a fused multiply-add, which rounds once.
    position = (np.arange(new) + half) * np.float64(np.float32(old / new)) - half
    position = np.maximum(position, 0).astype(np.float32)
    low = np.minimum(position.astype(np.int64), old - 1)
    return low, np.minimum(low + 1, old - 1), position - low.astype(np.float32)


def to_inputs(
    images: Iterable[UInt8[np.ndarray, "_ _ 3"]], mode: str = "clean"
) -> Float32[np.ndarray, "n 299 299 3"]:
    """Resizes images of any size to the FID network's input, in about [-1, 1], in threads."""
    middle = np.float32(_MIDDLE.get(mode, 0))
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter lock while it resizes
        resized = pool.map(lambda image: (resize(image, mode) - middle) / middle, images)
        return np.stack(list(resized))
