"""CLIP score: how well images fit their prompts, by the cosine of a CLIP's embeddings."""

import numpy as np
from jaxtyping import Float, Float64

from microdit_jax.errors import UserError


def cosines(
    images: Float[np.ndarray, "n e"], texts: Float[np.ndarray, "m k"]
) -> Float64[np.ndarray, " n"]:
    """Computes the cosine of each image's embedding with its text's, in float64.

    Raises:
      UserError: different numbers of images and texts, or different widths.
    """
    if images.shape != texts.shape:
        raise UserError(
            f"expected embeddings of images and of their texts, found {images.shape} and "
            f"{texts.shape}; give one text for each image, from the same CLIP"
        )
    images, texts = (np.asarray(x, np.float64) for x in (images, texts))
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return (images * texts).sum(axis=1) / lengths


def mean_score(values: Float[np.ndarray, "..."]) -> float:
    """Returns max(0, 100 mean cos), as torchmetrics does.

    Hessel et al. 2021 (arXiv:2104.08718) with w = 100. Tables often leave out the factor 100: 0.30
    there is 30 here.

    Args:
      values: `cosines` of all images.
    """
    return max(0.0, 100 * float(np.mean(values, dtype=np.float64)))


def clip_score(images: Float[np.ndarray, "n e"], texts: Float[np.ndarray, "m k"]) -> float:
    """Computes `mean_score` from the embeddings of images and of their texts.

    Raises:
      UserError: no images, or embeddings that do not belong together.
    """
    if not len(images):
        raise UserError("CLIP score: expected one or more images, found none")
    return mean_score(cosines(images, texts))
