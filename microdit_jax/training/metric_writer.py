"""Where a run's figures go: metrics.jsonl, TensorBoard, and Weights & Biases where asked for.

After a resume all three go on from the restored step: metrics.jsonl keeps no later line, so that it
ends up as an unbroken run's, line for line (but for what was measured with a clock).
"""

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from microdit_jax.errors import UserError
from microdit_jax.files import disk_errors, write_text

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Writes the figures of one run; for the process that does so.

    Args:
      workdir: holds metrics.jsonl, tensorboard/ and, with W&B, wandb/.
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
        with disk_errors(self._path):
            keep_until(self._path, restored_step)
            self._file = open(self._path, "a")
        if tensorboard:
            from tensorboardX import SummaryWriter  # takes a second to import

            self._tensorboard = SummaryWriter(
                str(Path(workdir) / "tensorboard"), purge_step=(restored_step or 0) + 1
            )
        if wandb_project:
            self._wandb = _start_wandb(wandb_project, Path(workdir), config or {})

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records figures, maybe in nested dictionaries, as one line: {"step": step} | values.

        The line is with the operating system when this returns; figures that are not finite become
        null, for which JSON has a word.
        """
        with disk_errors(self._path):
            print(json.dumps(_finite({"step": step} | dict(values))), file=self._file, flush=True)
        scalars = dict(_flat(values))
        if self._tensorboard is not None:
            for name, value in scalars.items():
                if math.isfinite(value):  # of others it warns, line by line
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step} | scalars)

    def image(self, step: int, name: str, image: Float[np.ndarray, "H W 3"]) -> None:
        """Shows a picture with values in [0, 1] in TensorBoard and W&B."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({"step": step, name: import_wandb().Image(image)})

    def close(self) -> None:
        """Ends all records."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def keep_until(path: str | os.PathLike, step: int | None) -> None:
    """Cuts off a metrics.jsonl after `step`; at None, removes it.

    A last line without its end, from a run killed while it wrote, goes too. The file is replaced as
    a whole: a kill in between leaves the old one.
    """
    path = Path(path)
    if step is None or not path.exists():
        path.unlink(missing_ok=True)
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    if "".join(kept) != path.read_text():
        write_text(path, "".join(kept))


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, but for one that a kill cut off.

    Raises:
      UserError: there is none.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"expected a training run with {METRICS_FILE} at {workdir}, found none")
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    """Lines with their ends; not what a run that was killed had begun to write."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested dictionaries by path, "a/b"; texts and None are left out."""
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
    """The package wandb; raises UserError where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "config.log.wandb needs the package wandb, found none; pip install wandb, or leave "
            "config.log.wandb empty"
        ) from error
    return wandb


def _start_wandb(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
    """W&B's run of this workdir: the same one after a resume."""
    wandb = import_wandb()
    id_file = workdir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    run = wandb.init(
        project=project, name=workdir.name, id=id_file.read_text(), resume="allow",
        dir=str(workdir), config=dict(config),
    )  # fmt: skip
    # W&B's own step may never go back, ours does when a run resumes.
    run.define_metric("*", step_metric="step")
    return run
