"""Draws the losses of training runs from their metrics.jsonl.

Example:
  python -m microdit_jax.plot --runs=runs/all/res_256_pretrain --runs=runs/all/res_256_finetune \
      --out=training.png
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from microdit_jax.cli import run
from microdit_jax.errors import UserError, disk_errors
from microdit_jax.metric_writer import read_metrics
from microdit_jax.run_checkpoint import read_run_metadata

RUNS = flags.DEFINE_multi_string("runs", [], "Workdirs of training runs, one panel each.")
OUT = flags.DEFINE_string("out", "training.png", "The picture to write.")

HELDOUT_STYLES = {"raw": ("#d95f02", "held out"), "ema": ("#1b9e77", "held out, moving average")}


def series(lines: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of training as "train", and of held-out pictures by kind of weights.

    Args:
      lines: of metrics.jsonl.
    """
    found: dict[str, list[tuple[int, float]]] = {"train": []}
    for line in lines:
        if line.get("loss") is not None:
            found["train"].append((line["step"], line["loss"]))
        for kind, losses in line.get("heldout", {}).items():
            found.setdefault(kind, []).append((line["step"], losses["right"]))
    return found


def draw(workdirs: Sequence[str | Path], out: str | Path) -> None:
    """Writes a picture with a panel for each run, in the order given.

    Raises:
      UserError: no runs, one without metrics.jsonl, or matplotlib is not installed.
    """
    if not workdirs:
        raise UserError("expected at least one run, found none; give --runs=WORKDIR")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "drawing needs the package matplotlib, found none; pip install matplotlib"
        ) from error
    runs = [
        (Path(d).name, read_run_metadata(d)["config"], series(read_metrics(d))) for d in workdirs
    ]
    figure = Figure(figsize=(3.4 * len(runs), 3.4), layout="constrained", dpi=100)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for panel, (name, config, lines) in zip(panels, runs, strict=True):
        panel.plot(*zip(*lines["train"], strict=True), color="#888888", lw=1, label="training")
        for kind, (color, label) in HELDOUT_STYLES.items():
            if kind in lines:
                style = {"marker": "o", "ms": 4, "lw": 1.5}
                panel.plot(*zip(*lines[kind], strict=True), color=color, label=label, **style)
        ratio, side = config["train"]["mask_ratio"], config["model"]["options"]["input_size"]
        panel.set_title(f"{name}\nmask ratio {ratio:g}, latents {side} x {side}", fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("EDM loss")
    panels[-1].legend(fontsize=8, frameon=False)
    with disk_errors(Path(out)):
        Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    draw(RUNS.value, OUT.value)
    print(f"{len(RUNS.value)} runs drawn in {OUT.value}")


if __name__ == "__main__":
    run(main)
