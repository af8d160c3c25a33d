"""Samples while a model trains: a grid to look at, and their distance to real images.

Captions and noise are the same at every evaluation. Where no samples can be made, the log says why
and training goes on: the state is saved after its evaluation, so that ending here would end every
restart at the same place.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from microdit_jax.data import twemoji
from microdit_jax.encoders.known_texts import KnownTexts
from microdit_jax.errors import UserError
from microdit_jax.evaluate.prompts import read_prompts
from microdit_jax.evaluate.reference import get_reference
from microdit_jax.evaluate.scores import feature_scores
from microdit_jax.images import captioned_grid, save_png, to_uint8
from microdit_jax.metrics.features import FeatureNetwork, small_features
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.training.evaluators.base import EvaluationContext, between, sampled_params
from microdit_jax.training.step import TrainState

BATCH_SIZE = 32  # images sampled and decoded at a time


class SampleGrid:
    """Writes a grid of samples to samples/step_*.png.

    The captions are the config's prompts, or, where it has none, held-out captions, each sample
    then beside the real image as decoded from its latents.
    """

    at_start = False

    def __init__(self, context: EvaluationContext):
        self._context, data = context, context.data
        self._real, count = None, context.config.eval.num_samples
        if context.config.eval.prompts:
            self._captions = list(context.config.eval.prompts[:count])
        else:
            chosen = np.linspace(0, len(data.heldout) - 1, min(count, len(data.heldout)))
            self._captions = [data.heldout_caption(int(i)) for i in chosen]
            self._real = np.stack([data.heldout[int(i)]["latents"] for i in chosen])
        self._pipe = with_texts(context.pipe, self._captions)

    def run(self, step: int, state: TrainState) -> None:
        """Samples the moving average, or the raw weights where none is kept."""
        with samples_may_fail(step, self._context.say):
            self._write(step, self.sample(sampled_params(state)))

    def sample(self, params: Any) -> Float32[np.ndarray, "H W 3"] | None:
        """Returns the grid (H, W, 3) in [0, 1], None where there is no decoder."""
        settings = self._context.config.eval
        pipe = dataclasses.replace(self._pipe, params=params)
        latents = pipe.generate(
            self._captions,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            seed=self._context.config.seed,
            batch_size=BATCH_SIZE,
            return_only_latents=True,
            progress=lambda evaluations: between(evaluations, self._context.check),
        )
        if pipe.codec is None:
            return None
        shown = [latents] if self._real is None else [self._real, latents]
        rows = [pipe.decode(row) for row in shown]
        return captioned_grid(rows, self._captions, columns=6 if len(rows) == 2 else 8)

    def _write(self, step: int, grid: Float32[np.ndarray, "H W 3"] | None) -> None:
        context = self._context
        if context.writer is not None and grid is not None:
            about = {"step": step, "attribution": context.data.attribution}
            save_png(context.workdir / "samples" / f"step_{step:07d}.png", grid, about)
            context.writer.image(step, "samples", grid)


class SampleScores:
    """Records the distance of samples to real images, in features that need no download.

    Few images give too large a distance (its bias falls as 1 / n): compare values of one run, or of
    runs with as many images, and none with FID-30k.

    Raises:
      UserError: no such prompts or images.
    """

    at_start = False

    def __init__(self, context: EvaluationContext):
        self._context, settings = context, context.config.eval
        emoji = twemoji.sets_of(context.config.data)
        prompts = read_prompts(settings.score_prompts, settings.score_images, emoji=emoji).texts
        self._pipe = with_texts(context.pipe, prompts)
        self._scorer = None
        if (codec := context.pipe.codec) is not None:
            self._scorer = Scorer(
                settings.score_reference,
                context.workdir / "references",
                resolution=context.model.config.input_size * codec.pixels_per_latent,
                emoji=emoji,
            )
        self._prompts = prompts

    def run(self, step: int, state: TrainState) -> None:
        """Writes one line to metrics.jsonl, {"samples": {"frechet_small": ...}}."""
        context, settings = self._context, self._context.config.eval
        with samples_may_fail(step, context.say):
            pipe = dataclasses.replace(self._pipe, params=sampled_params(state))
            latents = pipe.generate(
                self._prompts,
                guidance_scale=settings.guidance_scale,
                num_inference_steps=settings.num_inference_steps,
                seed=context.config.seed,
                batch_size=BATCH_SIZE,
                return_only_latents=True,
                progress=lambda evaluations: between(evaluations, context.check),
            )
            if context.writer is None or self._scorer is None:
                return
            scores = self._scorer(pipe, latents)
            context.writer.write(step, {"samples": scores})
            said = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            context.say(f"step {step}: samples against real images: {said}")


class Scorer:
    """Scores latents by the code of the whole evaluation, microdit_jax.evaluate.

    Args:
      reference: real images, as evaluate.reference.get_reference takes them.
      folder: where computed statistics are kept.
      resolution: pixels of a side of the model's images.
      emoji: the sets that "train" and "heldout" mean, as `twemoji.sets_of` gives them.
      network: the features; None takes the small ones, which need no download.
    """

    def __init__(
        self,
        reference: str,
        folder: Path,
        *,
        resolution: int,
        network: FeatureNetwork | None = None,
        emoji: Mapping[str, Sequence[str]] = twemoji.DEFAULT_SETS,
    ):
        self._metric = "frechet_small" if network is None else "fid"
        self._network = small_features() if network is None else network
        self._reference = get_reference(
            reference, self._network, folder, resolution=resolution, emoji=emoji
        )

    def __call__(
        self, pipe: LatentDiffusion, latents: Float[np.ndarray, "n h w c"]
    ) -> dict[str, float]:
        """Returns the scores, such as {"frechet_small": 0.3}, of scaled latents."""
        features = [
            self._network(list(to_uint8(pipe.decode(latents[start : start + BATCH_SIZE]))))
            for start in range(0, len(latents), BATCH_SIZE)
        ]
        return feature_scores([self._metric], np.concatenate(features), self._reference)


@contextlib.contextmanager
def samples_may_fail(step: int, say: Callable[[str], None]) -> Iterator[None]:
    """Turns a UserError of sampling, such as images that are not finite, into a line of the log."""
    try:
        yield
    except UserError as error:
        say(f"step {step}: no samples: {error}")


def with_texts(pipe: LatentDiffusion, texts: Sequence[str]) -> LatentDiffusion:
    """Returns the same pipeline, compiled programs included, for these texts alone."""
    return dataclasses.replace(pipe, text_encoder=KnownTexts(pipe.text_encoder, texts))
