"""The interface of evaluators, and the context of the run that they evaluate."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from microdit_jax.assets import load
from microdit_jax.diffusion import EdmConfig
from microdit_jax.models.dit import DiT
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.sampling.student import Student
from microdit_jax.training.data import RunData
from microdit_jax.training.metric_writer import MetricWriter
from microdit_jax.training.step import TrainState


@runtime_checkable
class Evaluator(Protocol):
    """Measures the state of a run and records what it finds.

    Attributes:
      at_start: True for one that also runs before a stage's first step.
    """

    at_start: bool

    def run(self, step: int, state: TrainState) -> None:
        """Evaluates the state after `step` steps; all processes call it."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationContext:
    """Parts of a run that its evaluators use.

    Attributes:
      writer: records figures; None on processes that do not write.
      say: prints a line, on the process that writes.
      check: called between the parts of an evaluation, on all processes in the same places; leaves
        it by an exception where the run stops.
      student: of a run that distils a teacher.
    """

    config: ConfigDict
    workdir: Path
    model: DiT
    edm: EdmConfig
    mesh: Mesh
    data: RunData
    writer: MetricWriter | None
    say: Callable[[str], None]
    check: Callable[[], None] = lambda: None
    student: Student | None = None

    @functools.cached_property
    def pipe(self) -> LatentDiffusion:
        """A sampling pipeline without weights; its decoder is on process 0 alone.

        Raises:
          UserError: a tower that is not there.
        """
        encoder = load.load_text_encoder(self.config.data.text_encoder)
        codec = None
        if jax.process_index() == 0:
            codec = load.load_codec(str(self.data.codec or self.config.data.vae))
        return LatentDiffusion(self.model, None, self.edm, encoder, codec, student=self.student)


def between(items: Iterable[Any], check: Callable[[], None]) -> Iterator[Any]:
    """Yields items, calling `check` before each."""
    for item in items:
        check()
        yield item


def sampled_params(state: TrainState) -> Any:
    """Returns the weights that samples are made with: the moving average where one is kept."""
    return state.params if state.ema is None else state.ema
