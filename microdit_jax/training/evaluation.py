"""Evaluators that measure a run while it trains, as config.eval.evaluators names them.

To add one, write a class like those in training/evaluators, and give it a line in EVALUATORS.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from microdit_jax.files import read_json, write_json
from microdit_jax.machine import hosts
from microdit_jax.machine.signals import EvaluationStopped, Phase, StopRequest
from microdit_jax.training.evaluators.base import EvaluationContext, Evaluator
from microdit_jax.training.evaluators.heldout_loss import HeldoutLossEvaluator
from microdit_jax.training.evaluators.page import RunPage
from microdit_jax.training.evaluators.samples import SampleGrid, SampleScores
from microdit_jax.training.step import TrainState

DUE_FILE = "evaluation_due.json"  # of a workdir: what a stop has left out, for the next start


class Entry(NamedTuple):
    """An evaluator's constructor; it is left out if the count `switch` of config.eval is 0."""

    make: Callable[[EvaluationContext], Evaluator]
    switch: str | None = None


EVALUATORS = {
    "heldout_loss": Entry(HeldoutLossEvaluator),
    "sample_scores": Entry(SampleScores, switch="score_images"),
    "sample_grid": Entry(SampleGrid, switch="num_samples"),
    "page": Entry(RunPage),
}


class Evaluations:
    """The evaluators of a run, and what is left of an evaluation that a signal has stopped.

    Args:
      context: the run.
      stop: asked between the parts of an evaluation.
    Raises:
      UserError: a tower, prompts or images that are not there.
    """

    def __init__(self, context: EvaluationContext, stop: StopRequest):
        names, made = _wanted(context), make_evaluators(context)
        self._made = dict(zip(names, made, strict=True))
        self._stop, self._workdir = stop, context.workdir

    @property
    def at_start(self) -> list[str]:
        """Names of those that also run before a stage's first step."""
        return [name for name, evaluator in self._made.items() if evaluator.at_start]

    def run(self, step: int, state: TrainState, names: Sequence[str] | None = None) -> bool:
        """Runs evaluators in order, all of them unless `names` are given; all processes call it.

        Returns:
          True if all have run. False if the run stops: `postpone` has noted those that are left.
        """
        left = [name for name in self._made if names is None or name in names]
        self._stop.phase = Phase.EVALUATING
        try:
            while left:
                self._stop.check()
                self._made[left[0]].run(step, state)
                del left[0]
        except EvaluationStopped:
            self._stop.acted = True
            self.postpone(step, left)
            return False
        finally:
            self._stop.phase = Phase.TRAINING
        if jax.process_index() == 0:
            (self._workdir / DUE_FILE).unlink(missing_ok=True)
        return True

    def postpone(self, step: int, names: Sequence[str] | None = None) -> None:
        """Notes what the next start is to evaluate first, if it resumes from this step."""
        if jax.process_index() == 0:
            left = list(self._made if names is None else names)
            write_json(self._workdir / DUE_FILE, {"step": step, "evaluators": left})


def evaluations_due(workdir: Path, step: int) -> list[str]:
    """Returns the names of the evaluators that a stop at this step has left out."""

    def read() -> list[str]:
        if not (workdir / DUE_FILE).is_file():
            return []
        note = read_json(workdir / DUE_FILE)
        return note["evaluators"] if note.get("step") == step else []

    return hosts.from_first("read which evaluations are due", read)


def make_evaluators(context: EvaluationContext) -> list[Evaluator]:
    """Makes the evaluators that the run's configuration names, in that order.

    Raises:
      UserError: a tower, prompts or images that are not there.
    """
    made = [EVALUATORS[name].make(context) for name in _wanted(context)]
    # One process may have converted towers for minutes, or measured real images, and the next
    # collective waits only half a minute for it.
    hosts.barrier("make evaluators", timeout_seconds=hosts.WORK_SECONDS)
    return made


def _wanted(context: EvaluationContext) -> list[str]:
    settings = context.config.eval
    switches = {name: EVALUATORS[name].switch for name in settings.evaluators}
    return [name for name, switch in switches.items() if switch is None or settings[switch]]
