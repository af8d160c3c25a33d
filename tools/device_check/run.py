"""Runs the parts one after another, each in a process that is ended at its time limit."""

import datetime
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from microdit_jax.errors import UserError, visible
from tools.device_check import machine, page
from tools.device_check.parts import PARTS, Part

REPORT, PAGE = "report.json", "page.md"


class Settings(NamedTuple):
    """Choices of one run.

    Attributes:
      out: folder of the report, the page and each part's log.
      platform: "gpu", or "cpu" to try the check itself.
      network: "XL_2", or "small" to try the check itself.
      seconds: time limit of the whole run.
      limits: time limits of parts by name, over those of `parts`.
    """

    out: Path
    platform: str
    network: str
    seconds: float
    reference: Path | None
    golden: Path
    limits: dict[str, float] = {}


def check(settings: Settings, names: Sequence[str]) -> dict[str, Any]:
    """Runs those parts that no earlier run has done; returns the report, written after each part.

    Raises:
      UserError: packages or the device are missing, or the report there is of another machine.
    """
    began = time.monotonic()
    versions = machine.check_packages()
    from microdit_jax.files import check_writable, read_json, write_json, write_text

    check_writable(settings.out / REPORT)
    here = machine.describe(settings.platform, settings.reference, settings.golden)
    report = {
        "machine": here,
        "versions": versions,
        "network": settings.network,
        "date": datetime.date.today().isoformat(),
        "parts": {},
    }
    if (settings.out / REPORT).exists():
        earlier = read_json(settings.out / REPORT)
        for what, one, other in (
            ("device", earlier["machine"]["device"]["kind"], here["device"]["kind"]),
            ("network", earlier["network"], settings.network),
            ("versions", earlier["versions"], versions),
        ):
            if one != other:
                raise UserError(
                    f"expected a report of the same {what} in {settings.out}, found {one} there "
                    f"and {other} here; give another --out"
                )
        report["parts"] = earlier["parts"]

    def write() -> None:
        write_json(settings.out / REPORT, report)
        write_text(settings.out / PAGE, page.render(report))

    write()
    for part in PARTS:
        if report["parts"].get(part.name, {}).get("state") == "done" or part.name not in names:
            continue
        left = settings.seconds - (time.monotonic() - began)
        report["parts"][part.name] = entry = run(part, settings, here["missing"], left)
        write()
        why = f": {entry['why']}" if entry["why"] else ""
        print(visible(f"{part.name}: {entry['state']}{why}"), flush=True)
    return report


def run(part: Part, settings: Settings, missing: Sequence[str], left: float) -> dict[str, Any]:
    """Runs one part in a process of its own; returns its state, the reason, seconds and figures.

    Args:
      missing: what this machine lacks, of machine.NEEDS.
      left: seconds that the whole run still has.
    """
    lacking = [machine.NEEDS[need] for need in part.needs if need in missing]
    if lacking:
        return {"state": "skipped", "why": "; ".join(lacking), "figures": {}}
    limit = min(settings.limits.get(part.name, part.seconds), left)
    if limit < 1:
        return {"state": "not reached", "why": "the run's time was over", "figures": {}}
    from microdit_jax.files import read_json

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "figures.json", settings.out / f"{part.name}.log"
        given = machine.environment(settings.platform)
        if settings.platform == "gpu":
            given |= part.environment
        with log.open("w") as output:
            child = subprocess.Popen(
                command(part, settings, result),
                stdout=output,
                stderr=output,
                cwd=machine.ROOT,
                env=given,
                start_new_session=True,
            )
            try:
                child.wait(limit)
                state, why = "done", ""
                if child.returncode:
                    state, why = "failed", f"{_last_line(log)} (all of it in {log.name})"
            except subprocess.TimeoutExpired:
                state, why = "ended at its limit", f"{limit:.0f} s were over"
            finally:  # also at Ctrl-C
                _end(child)
        figures = read_json(result) if result.exists() else {}
    took = time.monotonic() - began
    return {"state": state, "why": why, "seconds": took, "figures": figures}


def command(part: Part, settings: Settings, result: Path) -> list[str]:
    """Returns the command of a part's process, which writes its figures to the file `result`."""
    return [
        *(sys.executable, "-m", "tools.device_check.work", part.work, str(result)),
        *(settings.network, str(settings.golden), str(settings.reference or "")),
    ]


def _end(child: subprocess.Popen) -> None:
    """Ends a process with all that it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return visible(lines[-1], 300) if lines else "it said nothing"
