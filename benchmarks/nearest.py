"""Tells whether samples show what they should: is the right one of some real images the nearest?"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

SIDE = 8  # of the averages that are compared


def features(images: Float[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n f"]:
    """Averages images to 8 x 8 pixels, without each one's mean colour; of length 1."""
    n, h, w, _ = images.shape
    x = images.reshape(n, SIDE, h // SIDE, SIDE, w // SIDE, 3).mean((2, 4))
    x = (x - x.mean((1, 2), keepdims=True)).reshape(n, -1)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def right(
    samples: Float[np.ndarray, "n h w 3"],
    wanted: Sequence[int],
    real: Float[np.ndarray, "r h w 3"],
    owners: Sequence[int],
) -> Bool[np.ndarray, " n"]:
    """Tells which samples have a real image of their own prompt as the nearest, by the cosine.

    Args:
      wanted: number of each sample's prompt.
      owners: number of each real image's prompt.
    """
    nearest = (features(samples) @ features(real).T).argmax(1)
    return np.asarray(owners)[nearest] == np.asarray(wanted)
