"""Plots reports of microdit_jax.xla.aot: memory over capacity, and the step time's lower bounds.

Example:
  python -m microdit_jax.xla.plot --reports=stage1.json --reports=stage2.json --out=aot.png
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.xla.plot")

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from microdit_jax.commands.parser import Parser
from microdit_jax.commands.paths import local_places
from microdit_jax.errors import UserError, visible
from microdit_jax.files import atomic_file, check_writable, read_json

SECONDS = ("matmuls", "memory", "communication", "lower_bound")  # that are drawn, of a step


def read(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Reads reports from their JSON.

    Raises:
      UserError: no such file, or it is no report, or one for CPUs, whose peaks are not known.
    """
    reports = []
    for path in paths:
        try:
            found = read_json(path)
            chip = found["chip"]
            _check_figures(found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"expected a report of the lab's compiler, found none in {path}; run python -m "
                f"microdit_jax.xla.aot --report={path} first"
            ) from error
        if chip is None:
            raise UserError(
                "expected the report of a chip whose peaks are known, found "
                f"{found.get('topology')} "
                f"in {path}; take one of h100, v4, v5e, v5p, v6e"
            )
        reports.append(found)
    return reports


def _check_figures(report: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError for a report without the figures that are drawn."""
    if report["chip"] is None:
        return
    figures = [report["memory"][key] for key in ("arguments", "peak", "capacity")]
    figures += [report["seconds"][key] for key in SECONDS]
    if not all(type(figure) in (int, float) and abs(figure) < 1e18 for figure in figures):
        raise ValueError("figures that are no numbers")
    if not isinstance(report["config"], str) or not isinstance(report["topology"], str):
        raise ValueError("names that are no texts")


def draw(reports: Sequence[dict[str, Any]], out: str | Path) -> None:
    """Draws a bar for each report: memory over capacity, and the lower bounds of the step time.

    Raises:
      UserError: the name of `out` ends in no format that can be drawn.
    """
    # Two dollar signs in a name would make a formula of what is between them.
    names = [
        "\n".join(visible(r[key], 80).replace("$", r"\$") for key in ("config", "topology"))
        for r in reports
    ]
    figure = Figure(figsize=(10, 1.2 + 0.6 * len(reports)), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2, sharey=True)
    stacks: dict[str, list[float]] = collections.defaultdict(list)
    for r in reports:
        memory = r["memory"]
        stacks["arguments"].append(memory["arguments"] / 1e9)
        stacks["temporaries"].append((memory["peak"] - memory["arguments"]) / 1e9)
    start = [0.0] * len(reports)
    for (label, sizes), color in zip(stacks.items(), ("#1b9e77", "#7570b3"), strict=True):
        left.barh(names, sizes, left=start, label=label, color=color, height=0.6)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    for i, r in enumerate(reports):
        left.plot([r["memory"]["capacity"] / 1e9] * 2, [i - 0.4, i + 0.4], color="black")
    left.set_xlabel("GB on each device; the line: the chip's memory")
    for k, key in enumerate(SECONDS):
        positions = [i + 0.3 - 0.2 * k for i in range(len(reports))]
        times = [r["seconds"][key] * 1e3 for r in reports]
        right.barh(positions, times, height=0.18, label=key.replace("_", " "))
    right.set_xlabel("ms of a step, lower bounds by the roofline")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(
            fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1)
        )
    left.invert_yaxis()
    ending, known = Path(out).suffix[1:] or "png", figure.canvas.get_supported_filetypes()
    if ending not in known:
        raise UserError(f"--out must end in one of {', '.join(known)}, found {out}")
    with atomic_file(out) as file:
        figure.savefig(file, format=ending)


def main(arguments: Sequence[str]) -> None:
    parser = Parser("microdit_jax.xla.plot", __doc__)
    parser.add_argument(
        "--reports", action="append", required=True, help="JSON of aot --report; each a bar"
    )
    parser.add_argument("--out", default="aot.png", help="the image to write")
    args = parser.parse_args(arguments)
    check_writable(args.out)
    with local_places("microdit_jax.xla.plot", vars(args)) as local:
        vars(args).update(local)
        draw(read(args.reports), args.out)
        print(f"{len(args.reports)} reports drawn in {args.out}")
