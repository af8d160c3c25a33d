"""Files of a finished evaluation: result.json, a table beside the published scores, a plot."""

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from microdit_jax.assets import hub
from microdit_jax.evaluate.scores import TITLES
from microdit_jax.files import write_text

PAPERS = "dit_4_channel_37M_real_and_synthetic_data"
PACKAGES = ("microdit_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "pillow")


def environment() -> dict[str, str]:
    """Returns versions and devices, by name."""
    device = jax.devices()[0]
    return {name: version(name) for name in PACKAGES} | {
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def write(folder: Path, result: dict[str, Any]) -> list[Path]:
    """Writes result.json and result.md, and sweep.svg for several guidance scales.

    Args:
      result: contents of result.json; "results" has a row for each scale.
    Returns:
      The files written.
    """
    texts = {
        "result.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n",
        "result.md": markdown(result),
    }
    if len(result["results"]) > 1 and (plot := sweep(result["results"])):
        texts["sweep.svg"] = plot
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def markdown(result: dict[str, Any]) -> str:
    """Returns a table with a row for each guidance scale, the published scores beneath."""
    names = [n for n in TITLES if any(n in row["scores"] for row in result["results"])]
    head = ["model", "guidance", "steps", "images", "seeds", *(TITLES[name] for name in names)]
    steps = result["sampler"]["num_inference_steps"]
    rows = [
        [result["model"]["description"], f"{row['guidance_scale']:g}", f"{steps}",
         f"{row['images']}", f"{len(result['seeds'])}",
         *(_cell(row["scores"].get(name)) for name in names)]
        for row in result["results"]
    ]  # fmt: skip
    stem = Path(result["model"]["name"]).name.removesuffix(".pt")
    published = stem if stem in hub.RELEASED else PAPERS
    figures = hub.RELEASED[published]._asdict()
    if any(name in figures for name in names):
        cells = [f"{figures.get(name, '-')}" for name in names]
        count = "30000" if "fid" in names else "-"
        rows.append([f"published: {published}", "-", "-", count, "-", *cells])
    text = _table(head, rows)
    if result.get("geneval"):
        tasks = result["geneval"]["tasks"].items()
        text += "\n" + _table(["GenEval task", "score"], [[n, f"{s:.4g}"] for n, s in tasks])
    return text


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    text = f"{score['mean']:.4g}"
    if score["interval_95"]:
        text += " ({:.4g} to {:.4g})".format(*score["interval_95"])
    return text


def sweep(rows: Sequence[dict[str, Any]]) -> str:
    """Plots distance against CLIP score, or against guidance where there is no CLIP score.

    Returns:
      The SVG, "" where there is no distance to plot.
    """
    distance = next((n for n in ("fid", "frechet_small") if n in rows[0]["scores"]), None)
    if distance is None:
        return ""
    by = "clip_score" if "clip_score" in rows[0]["scores"] else None
    points = [
        (
            row["scores"][by]["mean"] if by else row["guidance_scale"],
            row["scores"][distance]["mean"],
            f"{row['guidance_scale']:g}",
        )
        for row in sorted(rows, key=lambda row: row["guidance_scale"])
    ]
    return _svg(points, TITLES[by] if by else "guidance scale", TITLES[distance])


def _svg(points: Sequence[tuple[float, float, str]], x_title: str, y_title: str) -> str:
    width, height, left, right, top, bottom = 560, 380, 70, 20, 20, 50
    x_low, x_high, x_ticks = _axis([x for x, _, _ in points])
    y_low, y_high, y_ticks = _axis([y for _, y, _ in points])

    def at(x, y):
        return (
            left + (x - x_low) / (x_high - x_low) * (width - left - right),
            height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for tick in x_ticks:
        x, y = at(tick, y_low)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        x, y = at(x_low, tick)
        parts.append(
            f'<line x1="{x:.1f}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    positions = [at(x, y) for x, y, _ in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#06c"/>')
    for (x, y), (_, _, label) in zip(positions, points, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#06c"/>')
        parts.append(f'<text x="{x + 6:.1f}" y="{y - 6:.1f}">{label}</text>')
    middle = (top + height - bottom) / 2
    parts.append(f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">{x_title}</text>')
    parts.append(
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{y_title}'
        "</text></svg>\n"
    )
    return "\n".join(parts)


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Returns the ends of an axis over all values, and round numbers on it."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    margin = 0.08 * (high - low)
    low, high = low - margin, high + margin
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    ticks = [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
    return low, high, ticks
