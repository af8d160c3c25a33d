"""The Fréchet distance between two sets of features, and the statistics that it needs.

Heusel et al. 2017 (arXiv:1706.08500), equation 6; FID is this with Inception's features.
"""

import dataclasses
import warnings

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64

from microdit_jax.errors import UserError

OFFSET = 1e-6  # added to the diagonals where the square root is not finite, as in pytorch-fid
IMAGINARY = 1e-3  # largest imaginary part taken for rounding, as in pytorch-fid


class RunningStatistics:
    """Mean and covariance of features that come in batches, in float64.

    Batches are merged by their means and sums of squares (Chan, Golub & LeVeque 1979), which stays
    accurate where the mean is large against the deviations from it.
    """

    def __init__(self, width: int):
        """Starts with no images.

        Args:
          width: features of one image.
        """
        self.count = 0
        self.mean = np.zeros(width)
        self._squares = np.zeros((width, width))  # sum of (x - mean)(x - mean)^T

    def add(self, features: Float[np.ndarray, "n f"]) -> None:
        """Adds a batch.

        Raises:
          UserError: the features have another width, or are not finite.
        """
        features = np.asarray(features, np.float64)
        n, width = features.shape
        if width != len(self.mean):
            raise UserError(f"expected features {len(self.mean)} wide, found {width}")
        if not np.isfinite(features).all():
            raise UserError(
                "expected finite features, found NaN or infinity; look at the images, and run the"
                " feature network in float32"
            )
        if not n:
            return
        mean = features.mean(axis=0)
        centred, step, total = features - mean, mean - self.mean, self.count + n
        self._squares += centred.T @ centred + np.outer(step, step) * (self.count * n / total)
        self.mean = self.mean + step * (n / total)
        self.count = total

    def result(self) -> "Statistics":
        """Returns the statistics so far, the covariance over n - 1 as in numpy.cov.

        Raises:
          UserError: fewer than two images.
        """
        if self.count < 2:
            raise UserError(f"expected features of two or more images, found {self.count}")
        return Statistics(self.mean, self._squares / (self.count - 1), self.count)


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """A Gaussian fitted to features.

    Attributes:
      mean: (f,).
      covariance: (f, f).
      count: number of images it was fitted to; None where a file does not say.
    """

    mean: Float64[np.ndarray, " f"]
    covariance: Float64[np.ndarray, "f f"]
    count: int | None = None

    @classmethod
    def of(cls, features: Float[np.ndarray, "n f"]) -> "Statistics":
        """Computes the statistics of features (n, f)."""
        running = RunningStatistics(features.shape[1])
        running.add(features)
        return running.result()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Computes d^2 = |m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians.

    Where the square root is not finite, 1e-6 is added to both diagonals; a small imaginary part,
    from rounding, is dropped. pytorch-fid does both.

    Raises:
      UserError: the widths differ, or there is no real square root.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"expected features of one width, found {len(a.mean)} and {len(b.mean)}; compare "
            "statistics of the same feature network"
        )
    difference = a.mean - b.mean
    root = _square_root(a.covariance @ b.covariance)
    if not np.isfinite(root).all():
        offset = OFFSET * np.eye(len(a.mean))
        root = _square_root((a.covariance + offset) @ (b.covariance + offset))
    diagonal = np.diagonal(root)
    if not np.allclose(np.imag(diagonal), 0, atol=IMAGINARY):
        raise UserError(
            "expected covariances whose product has a real square root, found an imaginary part of "
            f"{np.abs(np.imag(diagonal)).max():.2g}; take more images, or look at the features"
        )
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(difference @ difference + traces - 2 * np.real(diagonal).sum())


def _square_root(matrix: Float64[np.ndarray, "f f"]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", scipy.linalg.LinAlgWarning
        )  # the caller handles singular ones
        with np.errstate(all="ignore"):
            return np.asarray(scipy.linalg.sqrtm(matrix))
