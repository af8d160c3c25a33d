"""The scores of an evaluation: their names, how features become scores, values over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from microdit_jax.errors import UserError
from microdit_jax.evaluate.sample_set import Measure
from microdit_jax.metrics.clip_score import cosines
from microdit_jax.metrics.feature_sets import kernel_distance, precision_recall
from microdit_jax.metrics.frechet import Statistics, frechet_distance
from microdit_jax.metrics.statistics import Reference
from microdit_jax.towers import ImageEncoder

# Scores by name, with their titles in a table
TITLES = {
    "fid": "FID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "clip_score": "CLIP score",
    "geneval": "GenEval",
    "frechet_small": "Fréchet distance in small features (not comparable with FID)",
}
# Values of --metrics
METRICS = ("fid", "kid", "precision_recall", "clip_score", "geneval", "frechet_small")
INCEPTION_METRICS = ("fid", "kid", "precision_recall")
FEATURE_METRICS = (*INCEPTION_METRICS, "frechet_small")  # compare with real images


def feature_scores(
    metrics: Sequence[str], features: Float[np.ndarray, "n f"], reference: Reference
) -> dict[str, float]:
    """Computes FID, KID, precision and recall, as far as they are among the metrics.

    Raises:
      UserError: KID, precision or recall with a reference that has no features, or too few.
    """
    found: dict[str, float] = {}
    if "fid" in metrics or "frechet_small" in metrics:
        name = "fid" if "fid" in metrics else "frechet_small"
        found[name] = frechet_distance(Statistics.of(features), reference.statistics)
    if wanted := [name for name in ("kid", "precision_recall") if name in metrics]:
        if reference.features is None:
            raise UserError(
                f"for {', '.join(wanted)} expected the features of all real images, found "
                "statistics alone; give a folder of images as --reference"
            )
        if "kid" in wanted:
            size = min(1000, len(features), len(reference.features))
            found["kid"] = kernel_distance(features, reference.features, subset_size=size).mean
        if "precision_recall" in wanted:
            found |= precision_recall(features, reference.features)._asdict()
    return found


def over_seeds(values: Mapping[int, float]) -> dict[str, Any]:
    """Returns the values by seed, their mean, and its 95 % interval by Student's t.

    The interval is None for one seed.
    """
    numbers = np.array(list(values.values()), np.float64)
    interval = None
    if len(numbers) > 1:
        import scipy.stats  # takes a second, and training imports this module

        half = scipy.stats.t.ppf(0.975, len(numbers) - 1) * scipy.stats.sem(numbers)
        interval = [float(numbers.mean() - half), float(numbers.mean() + half)]
    return {
        "per_seed": {str(seed): value for seed, value in values.items()},
        "mean": float(numbers.mean()),
        "interval_95": interval,
    }


def measure_cosines(clip: ImageEncoder) -> Measure:
    """Returns a measure for `SampleSet`: each image's cosine with its prompt, (n, 1) float32."""

    def measure(images, prompts):
        found = cosines(clip.encode_images(images), clip.encode_texts(prompts))
        return found.astype(np.float32)[:, None]

    return measure
