"""The Markdown page of a check: every figure of every part, also of those that did not run."""

from typing import Any

from tools.device_check.parts import PARTS, Figure, Part

EMPTY = "—"


def render(report: dict[str, Any]) -> str:
    """Formats a report, as `run.check` writes it; of an empty one it lists what there will be."""
    lines = ["# Device check", "", *_machine(report), "", _overview(report), ""]
    for part in PARTS:
        entry = report.get("parts", {}).get(part.name, {})
        lines += [f"## {part.title}", "", *_state(part, entry), ""]
        figures = entry.get("figures", {})
        lines += ["| figure | found |", "|---|---|"]
        lines += [f"| {figure.text} | {shown(figure, figures)} |" for figure in part.figures]
        lines += ["", *_table(part, figures)]
    return "\n".join(lines).rstrip() + "\n"


def shown(figure: Figure, figures: dict[str, Any]) -> str:
    """Formats one figure; a dash for one that is not there."""
    value = figures.get(figure.key)
    if value is None:
        return EMPTY
    if isinstance(value, str):
        return value or "none"
    return f"{value:{figure.format}}"


def _machine(report: dict[str, Any]) -> list[str]:
    machine = report.get("machine")
    if machine is None:
        return ["No run yet."]
    device, torch = machine["device"], machine["torch"]
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    said = "none" if torch is None else torch.get("version") or f"broken: {torch['error']}"
    return [
        f"{device['kind']} ({device['platform']}), one of {device['count']}; network "
        f"{report['network']}; {report['date']}; commit {machine['commit']}.",
        f"Versions: {versions}; PyTorch: {said}.",
    ]


def _overview(report: dict[str, Any]) -> str:
    found = report.get("parts", {})
    rows = ["| part | state | s | of at most, s |", "|---|---|---|---|"]
    for part in PARTS:
        entry = found.get(part.name, {})
        seconds = f"{entry['seconds']:.0f}" if "seconds" in entry else EMPTY
        rows.append(
            f"| {part.name} | {entry.get('state', 'not run')} | {seconds} | {part.seconds:.0f} |"
        )
    return "\n".join(rows)


def _state(part: Part, entry: dict[str, Any]) -> list[str]:
    why = f": {entry['why']}" if entry.get("why") else ""
    return [f"`{part.name}`, {entry.get('state', 'not run')}{why}."]


def _table(part: Part, figures: dict[str, Any]) -> list[str]:
    if part.table is None:
        return []
    key, titles = part.table
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in figures.get(key) or [[EMPTY] * len(titles)]:
        cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]
