"""A page on training runs: losses, loss by noise level, throughput, and samples over time.

Training writes <workdir>/report.html after every evaluation; a chain of stages also has a page of
all stages beside their folders. By hand, as a page (.html) or as the curves alone (.png):
  python -m microdit_jax.training.report --runs=runs/all --out=training.png
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.training.report")

import base64
import html
import io
import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from microdit_jax.checkpoints.fetch import local_records
from microdit_jax.checkpoints.run import read_run_metadata, stages_of
from microdit_jax.errors import UserError, visible
from microdit_jax.files import check_writable, output_file, write_bytes
from microdit_jax.files.urls import as_given, scheme_of
from microdit_jax.training import goodput
from microdit_jax.training.metric_writer import read_metrics

if TYPE_CHECKING:  # matplotlib takes a second to import: only where a page is written
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING, RAW, EMA = "#888888", "#d95f02", "#1b9e77"
HELDOUT_STYLES = {"raw": (RAW, "held-out"), "ema": (EMA, "held-out, moving average")}
NUM_GRIDS = 8  # grids of samples on the page, spread over the run
# What is drawn or written of a line of metrics.jsonl, and in how many levels of dictionaries.
FIGURES = {"loss": 0, "skipped": 0, "speed": 1, "heldout": 2}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; overflow-wrap: break-word }}
img {{ max-width: 100% }} h2 {{ margin-top: 2.5rem }} table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }}
td {{ white-space: nowrap }} td:last-child {{ white-space: normal; min-width: 12rem }}
.wide {{ overflow-x: auto }} .wide > img {{ min-width: {width}; max-width: none; width: 100% }}
.grids {{ display: flex; gap: 1rem; overflow-x: auto }}
figure {{ margin: 0; flex: 0 0 min(26rem, 85vw) }} figcaption {{ color: #555 }}
</style></head><body><h1>{title}</h1>
<div class='wide'><img src="data:image/png;base64,{curves}"
  alt="Losses, loss by noise and throughput"></div>
<div class='wide'><table>
<tr><th>run<th>step<th>held-out loss, right<th>shuffled<th>ratio<th>images/s<th>skipped</tr>
{rows}</table></div>
{time}
{grids}
</body></html>
"""


def series(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Returns (step, loss) of training as "train", and on held-out images as "raw" and "ema".

    Args:
      lines: those of metrics.jsonl.
    """
    found: dict[str, list[tuple[int, float]]] = {"train": []}
    for line in lines:
        if line.get("loss") is not None:
            found["train"].append((line["step"], line["loss"]))
        for kind, losses in (line.get("heldout") or {}).items():
            if losses and losses.get("right") is not None:
                found.setdefault(kind, []).append((line["step"], losses["right"]))
    return found


class Run(NamedTuple):
    """A training run's folder, with its metrics.jsonl, config.json and, if it has, goodput.json.

    Attributes:
      workdir: a local folder: of a run on a bucket a copy.
      place: its path or URL.
    """

    workdir: Path
    place: str
    lines: list[dict[str, Any]]
    metadata: dict[str, Any]
    time: goodput.Totals | None


def read(workdirs: Sequence[str | Path]) -> list[Run]:
    """Reads the runs of these folders, which may be strangers'.

    Raises:
      UserError: no runs, one without metrics.jsonl, or one whose figures are no numbers.
    """
    if not workdirs:
        raise UserError("expected at least one run, found none; give --runs=WORKDIR")
    runs = []
    for workdir in [stage for given in workdirs for stage in stages_of(given)]:
        folder = local_records(workdir).absolute()
        place = as_given(workdir) if scheme_of(workdir) else str(folder)
        metrics = read_metrics(folder)
        runs.append(Run(folder, place, metrics, read_run_metadata(folder), goodput.read(folder)))
    for run in runs:
        for line in run.lines:
            for name, levels in FIGURES.items():
                try:
                    _check_numbers(line.get(name), levels)
                except ValueError as error:
                    raise UserError(
                        f"expected numbers as {name} of step {line['step']} in "
                        f"{visible(run.workdir)}, found {visible(error, 100)}; remove that line of "
                        "metrics.jsonl"
                    ) from error
    return runs


def _check_numbers(value: Any, levels: int) -> None:
    """Raises ValueError unless a value is numbers, below so many levels of dictionaries."""
    if value is None:  # not finite, or not measured
        return
    if not levels:
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
            raise ValueError(value if isinstance(value, str | int | float) else type(value))
    elif not isinstance(value, dict):
        raise ValueError(value if isinstance(value, str | int | float) else type(value))
    else:
        for name, item in value.items():
            by_sigma = name == "by_sigma"
            if by_sigma and isinstance(item, dict) and not all(map(_is_noise_level, item)):
                raise ValueError(f"noise levels {sorted(item)}")
            _check_numbers(item, levels if by_sigma else levels - 1)


def _is_noise_level(text: str) -> bool:
    try:
        return 1e-9 < float(text) < 1e9
    except ValueError:
        return False


# ------------------------------------------------------------------ curves
def curves(runs: Sequence[Run]) -> "Figure":
    """Draws a column for each run: loss by step, loss by noise level, images per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * max(2, len(runs)), 8.4), layout="constrained", dpi=100)
    panels = figure.subplots(3, len(runs), squeeze=False)
    for column, shown in zip(panels.T, runs, strict=True):
        ratio, side = (
            _setting(shown, *path)
            for path in (("train", "mask_ratio"), ("model", "options", "input_size"))
        )
        column[0].set_title(
            f"{visible(shown.workdir.name, 80)}\nmask ratio {ratio:g}, latents {side} x {side}",
            fontsize=10,
            parse_math=False,  # a name with two dollar signs is no formula
        )
        _plot_losses(column[0], shown.lines)
        _plot_by_sigma(column[1], shown.lines)
        _plot_speed(column[2], shown.lines)
    for row, label in zip(panels, ("EDM loss", "held-out loss", "images/s"), strict=True):
        row[0].set_ylabel(label)
        for panel in row:
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=7, frameon=False)
    return figure


def _setting(run: Run, *path: str) -> int | float:
    """Returns a number of the run's configuration."""
    value: Any = run.metadata.get("config")
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"expected a number as {'.'.join(path)} in the config.json of {visible(run.workdir)}, "
            "found none; copy it again"
        )
    return value


def _plot_losses(panel: "Axes", lines: Sequence[Mapping[str, Any]]) -> None:
    found = series(lines)
    if found["train"]:
        panel.plot(*zip(*found["train"], strict=True), color=TRAINING, lw=1, label="training")
    for kind, (color, label) in HELDOUT_STYLES.items():
        if kind in found:
            style = {"marker": "o", "ms": 4, "lw": 1.5}
            panel.plot(*zip(*found[kind], strict=True), color=color, label=label, **style)
    panel.set_xlabel("step")


def _plot_by_sigma(panel: "Axes", lines: Sequence[Mapping[str, Any]]) -> None:
    """Plots the first, middle and last evaluation, of the moving average where one is kept."""
    import matplotlib
    from matplotlib.ticker import LogLocator, NullFormatter

    evaluations = [(line["step"], line["heldout"]) for line in lines if line.get("heldout")]
    chosen = sorted({0, len(evaluations) // 2, len(evaluations) - 1}) if evaluations else []
    for i in chosen:
        step, kinds = evaluations[i]
        losses = (kinds.get("ema") or kinds.get("raw") or {}).get("by_sigma") or {}
        points = [(float(sigma), loss) for sigma, loss in losses.items() if loss is not None]
        if points:
            shade = (i + 1) / len(evaluations)
            color = matplotlib.colormaps["viridis_r"](0.15 + 0.85 * shade)
            style = {"marker": "o", "ms": 3, "lw": 1.2, "color": color}
            panel.plot(*zip(*points, strict=True), label=f"step {step}", **style)
            panel.set_xscale("log")
            # matplotlib's own labels overlap where the noise levels span less than a decade.
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("noise level, sigma")


def _plot_speed(panel: "Axes", lines: Sequence[Mapping[str, Any]]) -> None:
    speeds = [(line["step"], line["speed"]) for line in lines if line.get("speed")]
    points = [(step, speed.get("images_per_second")) for step, speed in speeds]
    if points := [(step, value) for step, value in points if value is not None]:
        panel.plot(*zip(*points, strict=True), color=TRAINING, lw=1)
    waits = [speed.get("data_wait") for _, speed in speeds]
    if waits := [value for value in waits if value is not None]:
        panel.set_title(f"{sum(waits) / len(waits):.1%} waiting for data", fontsize=9)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("step")


# ------------------------------------------------------------------ the page
def write(workdirs: Sequence[str | Path], out: str | Path) -> None:
    """Writes the page whole or not at all; a name that ends in .png gets the curves alone.

    The page holds the curves, and links to the grids of samples in the runs' own folders.

    Raises:
      UserError: no runs, one without metrics.jsonl, another ending, a full disk.
    """
    if (ending := Path(out).suffix) not in (".html", ".png"):
        raise UserError(f"expected a name that ends in .html or .png, found {out}")
    runs, image = read(workdirs), io.BytesIO()
    curves(runs).savefig(image, format="png")
    data = image.getvalue()
    if ending == ".html":
        page = PAGE.format(
            title=_escaped(", ".join(run.workdir.name for run in runs)),
            curves=base64.b64encode(data).decode(),
            width=f"{300 * len(runs)}px",  # text that can be read on a phone
            rows="\n".join(map(_row, runs)),
            time=_time(runs),
            grids="\n".join(_grids(run, out) for run in runs),
        )
        data = page.encode(errors="backslashreplace")
    with output_file(out) as path:
        write_bytes(path, data)


def _row(run: Run) -> str:
    """Returns the table's row of a run: the last value of each figure."""
    last: dict[str, Any] = {}
    for line in run.lines:
        last |= line
    kinds = last.get("heldout") or {}
    losses = kinds.get("ema") or kinds.get("raw") or {}
    cells = [losses.get(name) for name in ("right", "shuffled", "ratio")]
    cells = [f"{cell:.4f}" if cell is not None else "" for cell in cells]
    speed = (last.get("speed") or {}).get("images_per_second")
    cells += [f"{speed:,.0f}" if speed is not None else "", str(last.get("skipped", ""))]
    cells = [run.workdir.name, str(last.get("step", "")), *cells]
    return f"<tr>{''.join(f'<td>{_escaped(cell)}' for cell in cells)}</tr>"


def _time(runs: Sequence[Run]) -> str:
    """Returns a table of what the runs' wall time was spent on, over all restarts."""
    rows = []
    for run in runs:
        if run.time is None:
            continue
        rest = sorted(run.time.badput().items(), key=lambda item: -item[1])
        hours = sum(run.time.seconds.values()) / 3600
        cells = [run.workdir.name, f"{hours:,.2f}", str(run.time.restarts)]
        cells += [f"{run.time.goodput:.1%}", ", ".join(f"{kind} {x:.1%}" for kind, x in rest)]
        rows.append(f"<tr>{''.join(f'<td>{_escaped(cell)}' for cell in cells)}</tr>")
    if not rows:
        return ""
    kinds = "; ".join(f"{kind}: {text}" for kind, text in goodput.KINDS.items())
    head = "<tr><th>run<th>hours<th>restarts<th>goodput<th>the rest of the time</tr>"
    table = f"<table>{head}\n{''.join(rows)}</table>"
    return f"<div class='wide'>{table}</div><p>{_escaped(kinds)}</p>"


def _grids(run: Run, out: str | Path) -> str:
    """Returns the run's grids of samples, oldest first, each linked to its file from the page."""
    base = os.path.dirname(os.path.abspath(out))
    files = sorted((run.workdir / "samples").glob("step_*.png"))
    files = [file for file in files if re.fullmatch(r"step_\d{1,18}", file.stem, re.ASCII)]
    if not files:
        return ""
    last = len(files) - 1
    count = min(NUM_GRIDS, len(files))
    chosen = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
    parts = [f"<h2>Samples of {_escaped(run.workdir.name)}</h2><div class='grids'>"]
    for file in (files[i] for i in chosen):
        # A colon in the first part would make the rest a script's or another site's address.
        path = os.path.join(run.place, "samples", file.name)
        relative = os.fsencode(Path(os.path.relpath(path, base)).as_posix())
        link = html.escape(urllib.parse.quote(relative, safe="/ &"))
        step = int(file.stem.removeprefix("step_"))
        parts.append(
            f"<figure><a href='{link}'><img src='{link}' alt='Samples at step {step}' "
            f"loading='lazy'></a><figcaption>step {step:,}</figcaption></figure>"
        )
    attribution = run.metadata.get("attribution")
    note = f"<p>Images: {_escaped(attribution)}</p>" if attribution else ""
    return "\n".join([*parts, f"</div>{note}"])


def _escaped(text: object) -> str:
    """Returns a text of any origin for the page: no markup, nothing hidden, bounded."""
    return html.escape(visible(text), quote=True)


def main(arguments: Sequence[str]) -> None:
    # Not at the top: training imports this module, and no commands.
    from microdit_jax.commands.parser import Parser

    parser = Parser("microdit_jax.training.report", __doc__)
    parser.add_argument(
        "--runs",
        action="append",
        required=True,
        help="a training run's workdir, or the folder of a chain of stages; each run a column",
    )
    parser.add_argument("--out", default="report.html", help="the page (.html) or image (.png)")
    flags = parser.parse_args(arguments)
    check_writable(flags.out)
    write(flags.runs, flags.out)
    print(f"{len(flags.runs)} runs shown in {flags.out}")
