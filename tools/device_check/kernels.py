"""Times of a program's kernels by the profiler, beside the least that the roofline allows them."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from microdit_jax.machine.chips import Chip
from microdit_jax.xla import roofline
from microdit_jax.xla.hlo.count import Counts, Kernel

RUNS = 2  # of the program in a trace
LISTED = 20  # kernels in the table, those with the most time to lose first


class Traced(NamedTuple):
    """Seconds of one run: of each instruction by its name, and of all kernels together."""

    seconds: dict[str, float]
    total: float


def traced(run: Callable[[], Any], counts: Counts) -> Traced:
    """Runs a program under the profiler, and sums its kernels' times by HLO instruction."""
    names = {plain(kernel.name): kernel.name for kernel in counts.kernels}
    seconds: defaultdict[str, float] = defaultdict(float)
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(RUNS):
                run()
        for path in sorted(Path(folder).rglob("*.xplane.pb")):
            for name, duration in _events(path):
                known = names.get(plain(name))
                seconds[known or ""] += duration / RUNS
                total += duration / RUNS
    return Traced(dict(seconds), total)


def _events(path: Path) -> list[tuple[str, float]]:
    """Returns instruction (or kernel) and seconds of each event on a device.

    Of GPUs these are the kernels on their streams; a CPU's are those that name an instruction.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    found = []
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # sums of others, such as steps
            for event in line.events:
                stats = {key: value for key, value in event.stats if key == "hlo_op"}
                if stats or devices:
                    name = str(stats.get("hlo_op", event.name))
                    found.append((name, event.duration_ns / 1e9))
    return found


def plain(name: str) -> str:
    """Returns a name as kernels have it: "loop_fusion.12" is compiled to "loop_fusion_12"."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def compared(
    found: Traced, counts: Counts, chip: Chip | None, step_seconds: float
) -> dict[str, Any]:
    """Returns the figures of the part `step` about its kernels, and the rows of its table."""
    known = roofline.is_known(chip, (0,))
    sums: defaultdict[str, float] = defaultdict(float)
    rows = []
    for kernel in counts.kernels:
        seconds = found.seconds.get(kernel.name, 0.0)
        kind = "matmul" if kernel.flops else "other"
        sums[f"{kind}_ms"] += 1e3 * seconds
        bound, by = _bound(kernel, chip) if known and chip else (0.0, "unknown")
        sums[f"{kind}_bound_ms"] += 1e3 * bound
        if seconds:
            where = "/".join(kernel.op_name.split("/")[-3:])
            lost = 1e3 * (seconds - bound)
            rows.append([kernel.name, where, 1e3 * seconds, 1e3 * bound, lost, by])
    if not known:
        sums = defaultdict(float, {k: v for k, v in sums.items() if "bound" not in k})
    rows.sort(key=lambda row: -row[4])
    return {
        "kernels_ms": 1e3 * found.total,
        "idle_ms": max(0.0, 1e3 * (step_seconds - found.total)),
        "unattributed_ms": 1e3 * found.seconds.get("", 0.0),
        **sums,
        "kernels": rows[:LISTED],
    }


def _bound(kernel: Kernel, chip: Chip) -> tuple[float, str]:
    """Returns the least seconds of a kernel's runs, and what takes them."""
    alone = Counts((kernel,), (), {})
    time = roofline.step_time(alone, chip, (0,))
    return time.kernels, "matmuls" if time.matmuls > time.memory else "memory"
