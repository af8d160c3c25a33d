"""Evaluators that measure a run while it trains, as config.eval.evaluators names them.

To add one, write a class like those in training/evaluators, and give it a line in EVALUATORS.
"""

from collections.abc import Callable
from typing import NamedTuple

from microdit_jax.machine import hosts
from microdit_jax.training.evaluators.base import EvaluationContext, Evaluator
from microdit_jax.training.evaluators.heldout_loss import HeldoutLossEvaluator
from microdit_jax.training.evaluators.page import RunPage
from microdit_jax.training.evaluators.samples import SampleGrid, SampleScores


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


def make_evaluators(context: EvaluationContext) -> list[Evaluator]:
    """Makes the evaluators that the run's configuration names, in that order.

    Raises:
      UserError: a tower, prompts or images that are not there.
    """
    settings = context.config.eval
    entries = [EVALUATORS[name] for name in settings.evaluators]
    made = [
        entry.make(context) for entry in entries if entry.switch is None or settings[entry.switch]
    ]
    # One process may have converted towers for minutes, or measured real images, and the next
    # collective waits only half a minute for it.
    hosts.barrier("make evaluators", timeout_seconds=hosts.WORK_SECONDS)
    return made
