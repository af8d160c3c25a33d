"""The run's page, written anew at every evaluation."""

from microdit_jax.training import report
from microdit_jax.training.evaluators.base import EvaluationContext
from microdit_jax.training.step import TrainState


class RunPage:
    """Writes report.html of the workdir."""

    at_start = False

    def __init__(self, context: EvaluationContext):
        self._workdir, self._writes = context.workdir, context.writer is not None

    def run(self, step: int, state: TrainState) -> None:
        """Draws what the run's files hold so far."""
        if self._writes:
            report.write([self._workdir], self._workdir / "report.html")
