"""Distances of feature sets without a Gaussian fit: kernel distance (KID), precision and recall."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from microdit_jax.errors import UserError

SUBSETS = 100  # random subsets that KID is averaged over
NEIGHBOURS = 3  # k of precision and recall
BLOCK = 1 << 24  # distances held at a time: 128 MiB


class Kid(NamedTuple):
    """Kernel distance: mean and standard deviation over the subsets."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Shares of generated images near real ones, and of real ones near generated ones."""

    precision: float
    recall: float


def kernel_distance(
    generated: Float[np.ndarray, "n f"],
    real: Float[np.ndarray, "m f"],
    *,
    subset_size: int = 1000,
    seed: int = 2020,
) -> Kid:
    """Computes KID: the unbiased squared MMD with the kernel (x.y / f + 1)^3 over random subsets.

    Binkowski et al. 2018 (arXiv:1801.01401), section 4; defaults and random subsets are
    torch-fidelity's.

    Args:
      subset_size: images of a subset, on either side.
    Raises:
      UserError: fewer images than a subset takes.
    """
    sizes = (len(generated), len(real))
    if subset_size < 2 or min(sizes) < subset_size:
        raise UserError(
            f"KID: expected {max(2, subset_size)} images or more on either side, found {sizes[0]}"
            f" and {sizes[1]}; make more, or take subsets of at most {min(sizes)}"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(SUBSETS):
        x, y = (
            np.asarray(features[rng.choice(len(features), subset_size, replace=False)], np.float64)
            for features in (generated, real)
        )
        values.append(_mmd2(x, y))
    return Kid(float(np.mean(values)), float(np.std(values)))


def _mmd2(x: Float64[np.ndarray, "n f"], y: Float64[np.ndarray, "n f"]) -> float:
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
    return within / (n * (n - 1)) - 2 * kernel(x, y).sum() / n**2


def precision_recall(
    generated: Float[np.ndarray, "n f"], real: Float[np.ndarray, "m f"]
) -> PrecisionRecall:
    """Computes improved precision and recall.

    Kynkäänniemi et al. 2019 (arXiv:1904.06991), equations 1 and 2: an image is near a set if it is
    as near to one of the set's members as that member's k-th neighbour is, k = NEIGHBOURS.

    Raises:
      UserError: k images or fewer on a side.
    """
    if min(len(generated), len(real)) <= NEIGHBOURS:
        raise UserError(
            f"expected more than {NEIGHBOURS} images on either side, found {len(generated)} and "
            f"{len(real)}; make more"
        )
    return PrecisionRecall(
        float(_near(generated, real, NEIGHBOURS).mean()),
        float(_near(real, generated, NEIGHBOURS).mean()),
    )


def _near(
    points: Float[np.ndarray, "n f"], members: Float[np.ndarray, "m f"], k: int
) -> Bool[np.ndarray, " n"]:
    """Returns True for points in the ball around some member that reaches its k-th neighbour."""
    radii = np.concatenate(
        [np.partition(block, k, axis=1)[:, k] for block in _distances(members, members)]
    )
    return np.concatenate([(block <= radii).any(axis=1) for block in _distances(points, members)])


def _distances(
    a: Float[np.ndarray, "n f"], b: Float[np.ndarray, "m f"]
) -> Iterator[Float64[np.ndarray, "_ m"]]:
    """Yields squared distances, some rows at a time: |a|^2 + |b|^2 - 2 a.b in float64."""
    b = np.asarray(b, np.float64)
    lengths, rows = np.square(b).sum(axis=1), max(1, BLOCK // len(b))
    for start in range(0, len(a), rows):
        part = np.asarray(a[start : start + rows], np.float64)
        squared = np.square(part).sum(axis=1)[:, None] + lengths[None] - 2 * (part @ b.T)
        yield np.maximum(squared, 0)
