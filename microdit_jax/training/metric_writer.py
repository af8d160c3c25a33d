"""Writes a run's metrics to metrics.jsonl, TensorBoard and, if asked for, Weights & Biases.

After a resume all three continue from the restored step. Lines of metrics.jsonl after that step are
removed, so that in the end it equals an unbroken run's line for line, timings apart.
"""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from microdit_jax.errors import UserError, visible
from microdit_jax.files import disk_errors, parse_json, read_bytes, write_text
from microdit_jax.training.event_file import EventFile

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Writes the metrics of one run, on the one process that does so.

    Args:
      workdir: folder of metrics.jsonl, tensorboard/ and, with W&B, wandb/.
      restored_step: the step that this run resumes from; None starts all records anew.
      wandb_project: W&B project; empty for none.
      config: the run's configuration, shown by W&B.
    Raises:
      UserError: W&B was asked for and is not installed; a full disk.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        restored_step: int | None,
        tensorboard: bool = True,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self._path = Path(workdir) / METRICS_FILE
        self._tensorboard = self._wandb = None
        if wandb_project:
            import_wandb()  # before anything is opened
        with disk_errors(self._path):
            keep_until(self._path, restored_step)
            self._file = open(self._path, "a")
        if tensorboard:
            folder = Path(workdir) / "tensorboard"
            with disk_errors(folder):
                self._tensorboard = EventFile(folder, purge_step=(restored_step or 0) + 1)
        if wandb_project:
            self._wandb = _start_wandb(wandb_project, Path(workdir), config or {})

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records values, nested dictionaries too, as one line: {"step": step} | values.

        The line is flushed when this returns. Values that are not finite become null, since JSON
        has no NaN.
        """
        with disk_errors(self._path):
            print(json.dumps(_finite({"step": step} | dict(values))), file=self._file, flush=True)
        scalars = dict(_flat(values))
        if self._tensorboard is not None:
            finite = {name: x for name, x in scalars.items() if math.isfinite(x)}
            with disk_errors(self._path.parent / "tensorboard"):
                self._tensorboard.scalars(step, finite)
        if self._wandb is not None:
            self._wandb.log({"step": step} | scalars)

    def mark_restart(self, number: int, *, step: int, reached: int) -> None:
        """Marks in TensorBoard and W&B where a run began again, and which steps are run twice.

        Args:
          number: of the restart; 0 marks nothing.
          step: the step that it began from.
          reached: the last step that was done before.
        """
        if not number:
            return
        again = f"; steps {step + 1} to {reached} are run again" if reached > step else ""
        if self._tensorboard is not None:
            with disk_errors(self._path.parent / "tensorboard"):
                self._tensorboard.text(step, "restarts", f"restart {number} at step {step}{again}")
        if self._wandb is not None:
            redone = max(0, reached - step)
            self._wandb.log({"step": step, "restart": number, "restart_redoes_steps": redone})

    def image(self, step: int, name: str, image: Float[np.ndarray, "H W 3"]) -> None:
        """Shows an image with values in [0, 1] in TensorBoard and W&B."""
        if self._tensorboard is not None:
            with disk_errors(self._path.parent / "tensorboard"):
                self._tensorboard.image(step, name, image)
        if self._wandb is not None:
            self._wandb.log({"step": step, name: import_wandb().Image(image)})

    def close(self) -> None:
        """Closes all files; raises nothing, as each line was on disk when `write` returned."""
        for file in (self._file, self._tensorboard):
            with contextlib.suppress(OSError):  # what a full disk did not take is tried once more
                if file is not None:
                    file.close()
        if self._wandb is not None:
            self._wandb.finish()


def keep_until(path: str | os.PathLike, step: int | None) -> None:
    """Removes the lines of a metrics.jsonl after `step`, or the whole file if `step` is None.

    An unfinished last line, from a run killed while it wrote, goes too. The file is replaced
    atomically: a kill leaves the old one or the new one.
    """
    path = Path(path)
    if step is None or not path.exists():
        path.unlink(missing_ok=True)
        return
    kept = "".join(line for line, found in _whole_lines(path) if found["step"] <= step)
    if kept.encode() != read_bytes(path):
        write_text(path, kept)


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the lines of a run's metrics.jsonl, without an unfinished last one.

    Raises:
      UserError: the run has none, or a line of it is no JSON object with a step.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"expected a training run with {METRICS_FILE} at {workdir}, found none")
    return [found for _, found in _whole_lines(path)]


def _whole_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the lines with their ends and what they say, without an unfinished last one."""
    lines = []
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
        try:
            found = parse_json(line)
            if not isinstance(found, dict) or type(found.get("step")) is not int:
                raise ValueError("no step")
            if not 0 <= found["step"] < 2**63:
                raise ValueError("a step that no run reaches")
        except ValueError as error:
            raise UserError(
                f"expected the metrics of a step in line {number} of {visible(path)}, found damage "
                f"({error}); remove that line"
            ) from error
        lines.append((line.decode("utf-8-sig") + "\n", found))
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of nested dictionaries by path, "a/b"; texts and None are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def import_wandb() -> Any:
    """Imports the package wandb; raises UserError if it is not installed."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]  (not a dependency)
    except ImportError as error:
        raise UserError(
            "config.log.wandb needs the package wandb, found none; pip install wandb, or leave "
            "config.log.wandb empty"
        ) from error
    return wandb


def _start_wandb(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
    """Starts W&B's run of this workdir, the same one after a resume."""
    wandb = import_wandb()
    id_file = workdir / "wandb_id"
    if not id_file.exists() or not id_file.stat().st_size:  # empty: of a disk that lost its bytes
        write_text(id_file, secrets.token_hex(8))
    run = wandb.init(
        project=project, name=workdir.name, id=id_file.read_text(), resume="allow",
        dir=str(workdir), config=dict(config),
    )  # fmt: skip
    # W&B's own step must never decrease, and ours does when a run resumes.
    run.define_metric("*", step_metric="step")
    return run
