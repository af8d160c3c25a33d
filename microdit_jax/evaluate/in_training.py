"""Scores of a few samples while a model trains, by the code of the whole evaluation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from microdit_jax.evaluate.reference import get_reference
from microdit_jax.evaluate.scores import feature_scores
from microdit_jax.images import to_uint8
from microdit_jax.metrics.features import FeatureNetwork, small_features
from microdit_jax.noise import initial_noise
from microdit_jax.sampling.pipeline import LatentDiffusion


class TrainingScores:
    """Draws the same captions from the same noise at every call, and scores the pictures.

    Few pictures give too large a distance (its bias falls as 1 / n): compare values of one run, or
    of runs with as many pictures, and none with FID-30k.

    Args:
      prompts: what to draw.
      reference: real pictures, as evaluate.reference.get_reference takes them; "" where nothing is
        scored: on processes without a codec.
      folder: where computed statistics are kept.
      resolution: pixels of the model's pictures.
      network: the features; None takes the small ones, which need no download.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        reference: str,
        folder: Path,
        *,
        resolution: int,
        network: FeatureNetwork | None = None,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 18,
        seed: int = 0,
        batch_size: int = 32,
    ):
        self._metric = "frechet_small" if network is None else "fid"
        self._network = small_features() if network is None else network
        self._reference = None
        if reference:
            self._reference = get_reference(reference, self._network, folder, resolution=resolution)
        self._prompts, self._seed = list(prompts), seed
        self._sampling = {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "batch_size": batch_size,
        }

    def __call__(self, pipe: LatentDiffusion) -> dict[str, float] | None:
        """The scores, such as {"frechet_small": 0.3}; None where nothing is scored.

        All processes call it; `pipe` holds the weights as they are now.
        """
        cfg = pipe.model.config
        size = (cfg.input_size, cfg.input_size, cfg.in_channels)
        noise = initial_noise("jax", self._seed, len(self._prompts), *size)
        latents = pipe.generate(
            self._prompts, noise=noise, return_only_latents=True, **self._sampling
        )
        if self._reference is None:
            return None
        step = self._sampling["batch_size"]
        features = [
            self._network(list(to_uint8(pipe.decode(latents[start : start + step]))))
            for start in range(0, len(latents), step)
        ]
        return feature_scores([self._metric], np.concatenate(features), self._reference)
