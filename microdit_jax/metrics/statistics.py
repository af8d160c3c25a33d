"""Files of reference statistics: ours, and those of pytorch-fid, clean-fid and torch-fidelity."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from microdit_jax.errors import UserError
from microdit_jax.files import atomic_file, parse_json, read_npz
from microdit_jax.metrics.frechet import Statistics

ABOUT = "about"  # key of the JSON in our files that describes features and inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images, and where they come from.

    Attributes:
      statistics: mean and covariance.
      features: (n, f) of every image, if the file holds them; KID and recall need these.
      about: description in our own files: "features" (name of the feature space), "inputs" (hash
        of the images), "count"; empty for files of other packages.
    """

    statistics: Statistics
    features: Float32[np.ndarray, "n f"] | None
    about: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 of mean and covariance, whatever file they came in."""
        parts = (self.statistics.mean, self.statistics.covariance)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def check_features(self, name: str, width: int) -> None:
        """Raises UserError where these are not features of that name and width."""
        found = self.about.get("features")
        if found not in (None, name) or len(self.statistics.mean) != width:
            raise UserError(
                f"expected reference statistics of {name}, {width} wide, found "
                f"{found or 'unnamed ones'}, {len(self.statistics.mean)} wide; compute them again, "
                "or choose the same features"
            )


def save_reference(
    path: Path, features: Float[np.ndarray, "n f"], *, name: str, inputs: str
) -> Reference:
    """Writes features and their statistics as .npz, with pytorch-fid's keys mu and sigma.

    Args:
      name: name of the feature space.
      inputs: hash of the images.
    """
    statistics = Statistics.of(features)
    about = {"features": name, "inputs": inputs, "count": len(features)}
    arrays = {"mu": statistics.mean, "sigma": statistics.covariance}
    arrays["feats"] = np.asarray(features, np.float32)  # for KID, precision and recall
    write_npz(path, arrays | {ABOUT: np.array(json.dumps(about))})
    return load_reference(path)


def load_reference(path: Path) -> Reference:
    """Reads .npz with mu and sigma, or with feats alone (clean-fid's for KID).

    Raises:
      UserError: the file is missing, damaged, or has neither.
    """
    try:
        arrays = read_npz(path)
        about = parse_json(str(arrays.get(ABOUT, "{}")))
        if not isinstance(about, dict):
            raise ValueError(f"no JSON object in {ABOUT}")
        for key, axes in {"mu": 1, "sigma": 2, "feats": 2}.items():
            if key in arrays and (arrays[key].dtype.kind not in "fiu" or arrays[key].ndim != axes):
                raise ValueError(f"{key} of type {arrays[key].dtype} and shape {arrays[key].shape}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"expected .npz of reference statistics at {path}, could not read it ({error}); give "
            "such a file or a folder of images"
        ) from error
    features = arrays.get("feats")
    if features is not None:
        features = np.asarray(features, np.float32)
    if "mu" in arrays and "sigma" in arrays:
        mean, covariance = (np.asarray(arrays[key], np.float64) for key in ("mu", "sigma"))
        if covariance.shape != 2 * mean.shape:
            raise UserError(
                f"expected mu (f,) and sigma (f, f) in {path}, found {mean.shape} and "
                f"{covariance.shape}; give a file of statistics"
            )
        return Reference(Statistics(mean, covariance, about.get("count")), features, about)
    if features is not None:
        return Reference(Statistics.of(features), features, about)
    raise UserError(
        f"expected arrays mu and sigma, or feats, in {path}, found {', '.join(arrays) or 'none'}; "
        "give a file of pytorch-fid, clean-fid, torch-fidelity or ours"
    )


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz, whole or not at all."""
    with atomic_file(path, sum(array.nbytes for array in arrays.values())) as file:
        # NumPy's stub takes any name for `allow_pickle`.
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
