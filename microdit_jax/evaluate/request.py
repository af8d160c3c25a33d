"""The subject of an evaluation, and the request: the command's flags."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from microdit_jax.assets import load
from microdit_jax.errors import UserError
from microdit_jax.evaluate.scores import FEATURE_METRICS, INCEPTION_METRICS, METRICS
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.sampling.settings import Sampler
from microdit_jax.sampling.student import Student, settled

# Flags that only some metrics use, with these metrics
FOR_METRICS = {
    "inception": INCEPTION_METRICS,
    "reference": FEATURE_METRICS,
    "clip": ("clip_score",),
    "geneval_prompts": ("geneval",),
}


class Subject(NamedTuple):
    """The model under evaluation, with the name a person gave it by."""

    name: str
    model: load.Model
    pipe: LatentDiffusion


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """Metrics, prompts and settings of an evaluation; checks them against one another.

    The fields are the flags of python -m microdit_jax.evaluate; `sampler` holds those of the
    sampler, of which the guidance scale goes by `guidance_scales`.
    """

    metrics: tuple[str, ...] = ("frechet_small",)
    prompts: str = "train"
    num_images: int = 0
    guidance_scales: tuple[float, ...] = (5.0,)
    seeds: tuple[int, ...] = (2024,)
    sampler: Sampler = Sampler()
    batch_size: int = 32
    chunk_size: int = 128
    reference: str | None = None
    inception: str | None = None
    resize: str = "clean"
    side: int = 0
    clip: str | None = None
    geneval_prompts: str | None = None
    geneval_results: str | None = None
    keep_images: bool = False

    def __post_init__(self):
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise UserError(
                f"--metrics takes {', '.join(METRICS)}, found {', '.join(unknown) or 'none'}"
            )
        inception = [name for name in self.metrics if name in INCEPTION_METRICS]
        for metrics, flag, hint in (
            (inception, "inception", "or take frechet_small, which needs no download"),
            ([m for m in self.metrics if m == "clip_score"], "clip", "both towers are needed"),
        ):
            if metrics and getattr(self, flag) is None:
                raise UserError(f"--{flag} is needed for {', '.join(metrics)}, found none; {hint}")
        for flag, metrics in FOR_METRICS.items():
            if getattr(self, flag) and not set(metrics) & set(self.metrics):
                raise UserError(
                    f"--{flag} is for --metrics={','.join(metrics)}, found --metrics="
                    f"{','.join(self.metrics)}; ask for one of those, or leave --{flag} out"
                )
        if inception and "frechet_small" in self.metrics:
            raise UserError(f"frechet_small goes without {', '.join(inception)}; ask for one")
        if "geneval" in self.metrics and not (self.geneval_prompts or self.geneval_results):
            raise UserError("geneval needs --geneval_prompts to sample, or --geneval_results")
        sets = len(self.guidance_scales) * len(self.seeds)
        if self.geneval_results and sets != 1:
            raise UserError(
                f"--geneval_results belongs to one guidance scale and one seed, found {sets} sets"
            )
        if not self.guidance_scales or not self.seeds:
            raise UserError("expected a guidance scale and a seed, found none")
        if not all(map(math.isfinite, self.guidance_scales)):
            found = ",".join(map(str, self.guidance_scales))
            raise UserError(f"--guidance_scale takes finite numbers, found {found}")
        for scale in self.guidance_scales:
            self.sampler_at(scale)  # raises for a scale out of its range

    def sampler_at(self, guidance_scale: float) -> Sampler:
        """Returns the sampler of one guidance scale."""
        return dataclasses.replace(self.sampler, guidance_scale=guidance_scale)

    def for_network(
        self, student: Student | None, chosen: Mapping[str, Any]
    ) -> "EvaluationRequest":
        """Returns the request with what a few-step student decides filled in.

        Args:
          student: of the network; None: it is none.
          chosen: fields of the sampler that a person asked for.
        Raises:
          UserError: as `sampling.student.settled` does.
        """
        settings = settled(dict(chosen), student)
        if student is None:
            return self
        return dataclasses.replace(
            self, sampler=Sampler(**settings), guidance_scales=(student.guidance_scale,)
        )
