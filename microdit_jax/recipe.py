"""Several stages, one after the other, as one run."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from microdit_jax import report, run_checkpoint
from microdit_jax.errors import UserError
from microdit_jax.run_checkpoint import RunCheckpoints
from microdit_jax.run_config import check_counts
from microdit_jax.signals import StopRequest
from microdit_jax.train import train


def run(config: ConfigDict, workdir: str | Path) -> bool:
    """Trains the stages of `config.stages`, each in its folder of the workdir.

    The same call again passes over the stages that are done, and resumes in the right one. After
    each, <workdir>/report.html shows all that have begun.

    Returns:
      Whether all are done; not so after a signal.
    Raises:
      UserError: a stage that the config does not have; what `train` raises.
    """
    for name in config.stages:
        if name not in config:
            raise UserError(f"config.stages names {name}, found no such stage in the config")
        check_counts(config[name])  # the last stage's too, before the first one's days
    with StopRequest() as stop:
        for number, name in enumerate(config.stages):
            # Several processes agree in the next stage's first step.
            if stop.received and jax.process_count() == 1:
                return False
            stage, folder = config[name], Path(workdir) / name
            with RunCheckpoints(folder) as checkpoints:
                done = (checkpoints.latest_step() or 0) >= stage.train.steps
            if jax.process_index() == 0:
                print(f"stage {number + 1} of {len(config.stages)}, {name}{': done' * done}")
            if done:
                continue
            done = int(train(stage, folder, stop).step) >= stage.train.steps
            _report(config, Path(workdir))
            if not done:
                return False
    return True


def _report(config: ConfigDict, workdir: Path) -> None:
    """A page on all stages that have begun."""
    begun = [workdir / name for name in config.stages if run_checkpoint.is_run(workdir / name)]
    if jax.process_index() == 0 and begun:
        report.write(begun, workdir / "report.html")
