"""Measures one row of the benchmark for each variant; prints and plots them."""

import dataclasses
import datetime
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from matplotlib.figure import Figure

from microdit_jax.files import atomic_file, disk_errors, write_text
from microdit_jax.machine import compile_options
from microdit_jax.machine.processor import processor
from microdit_jax.models.dit import DiTConfig
from microdit_jax.xla.bench import timing, workloads
from microdit_jax.xla.bench.workloads import Size, Variant, Workload

Row = dict[str, Any]


class Reference(Protocol):
    """Another implementation of the same network, timed beside ours (benchmarks/)."""

    def __call__(self, what: str, config: DiTConfig, size: Size) -> Callable[[], Any] | None:
        """Prepares one workload; returns None for one that the other implementation lacks.

        Returns:
          A function that does the work once and returns when it is done.
        """
        ...


class TimingOptions(NamedTuple):
    """Number of timed and untimed turns, the reference, and the folder for HLO and traces."""

    repeats: int
    warm_up: int
    reference: Reference | None = None
    dump: Path | None = None


# Environment variables that change a program's speed.
ENVIRONMENT = sorted({"LD_PRELOAD", "XLA_FLAGS"}.union(*compile_options.ENVIRONMENT.values()))


def new(arch: str, input_size: int, size: Size) -> dict[str, Any]:
    """Returns a report without rows: the machine, the software, and the amount of work."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": processor()._asdict(),
        "jax": jax.__version__,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "arch": arch,
        "input_size": input_size,
        "size": size._asdict(),
        "rows": [],
    }


def measure(
    what: str, config: DiTConfig, size: Size, variant: Variant, options: TimingOptions
) -> Row:
    """Compiles one variant and times it in turns with a large matmul and the reference.

    Raises:
      UserError: a variant that cannot run here, or a reference that cannot.
    """
    theirs = options.reference(what, config, size) if options.reference else None
    work = workloads.COMPILE[what](config, size, variant)
    matmul, matmul_operations = timing.matmul(variant.dtype)
    runs = [work.run, matmul] + ([theirs] if theirs else [])
    ours, matmul_time, *rest = timing.take_turns(
        runs, repeats=options.repeats, warm_up=options.warm_up
    )
    if options.dump:
        _dump(options.dump / name(what, variant), work)
    rate = work.operations / np.median(ours.seconds) / jax.device_count()
    matmul_rate = matmul_operations / np.median(matmul_time.seconds)
    row = {
        "what": what,
        "variant": {key: getattr(variant, key) for key in workloads.MATTERS[what]},
        "seconds": ours.summary(),
        "compile_seconds": work.compile_seconds,
        "operations": work.operations,
        "memory": _memory(work.compiled),
        "matmul_operations_per_second": matmul_rate,
        "share_of_matmul": rate / matmul_rate,
    }
    if rest:
        row["reference_seconds"] = rest[0].summary()
        row["over_reference"] = ours.over(rest[0])
    del work, runs, theirs
    gc.collect()  # frees the state before the next variant's is made
    return row


def _memory(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Returns bytes on each device; None where the backend does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def name(what: str, variant: Variant) -> str:
    """Returns the name of a variant in tables, and of its files."""
    values = dataclasses.asdict(variant)
    return "_".join([what, *(str(values[key]) for key in workloads.MATTERS[what])])


def _dump(folder: Path, work: Workload) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "optimised_hlo.txt").write_text(work.compiled.as_text() or "")
        with jax.profiler.trace(str(folder)):
            work.run()


def line(row: Row) -> str:
    """Formats one row as text."""
    seconds, memory = row["seconds"], row["memory"]
    text = "_".join([row["what"], *map(str, row["variant"].values())])
    text = f"{text:44} {seconds['median']:9.4f} s (spread {100 * seconds['spread']:3.0f} %)"
    text += f"  compile {row['compile_seconds']:6.1f} s"
    if memory:
        text += f"  temporaries {memory['temporaries'] / 2**20:8.0f} MiB"
    text += f"  {100 * row['share_of_matmul']:3.0f} % of the matmul's "
    text += f"{row['matmul_operations_per_second'] / 1e9:.0f} GFLOP/s"
    if "over_reference" in row:
        over = row["over_reference"]
        text += f"  {over['median']:.2f} x reference [{over['lowest']:.2f}, {over['highest']:.2f}]"
        text += f", lowest times {over['of_lowest']:.2f}"
    return text


def write(report: dict[str, Any], path: Path) -> None:
    """Writes the report as JSON and, if it has rows, a bar chart beside it.

    Raises:
      UserError: the disk is full.
    """
    write_text(path, json.dumps(report, indent=1) + "\n")
    if report["rows"]:
        draw(report, path.with_suffix(".png"))


def draw(report: dict[str, Any], out: Path) -> None:
    """Draws the medians of all variants as bars, with the reference's beside them."""
    rows = report["rows"]
    works = list(dict.fromkeys(row["what"] for row in rows))
    height = 0.8 + 0.45 * len(rows) + 0.5 * len(works)
    figure = Figure(figsize=(8, height), layout="constrained", dpi=100)
    counts = [sum(row["what"] == work for row in rows) for work in works]
    panels = figure.subplots(len(works), 1, squeeze=False, height_ratios=counts)[:, 0]
    for panel, work in zip(panels, works, strict=True):
        found = [row for row in rows if row["what"] == work]
        positions = np.arange(len(found))
        labels = [", ".join(map(str, row["variant"].values())) for row in found]
        seconds = [row["seconds"]["median"] for row in found]
        panel.barh(positions, seconds, height=0.4, color="#1b9e77", label="ours")
        if "reference_seconds" in found[0]:
            theirs = [row["reference_seconds"]["median"] for row in found]
            panel.barh(positions + 0.4, theirs, height=0.4, color="#888888", label="reference")
            panel.set_xlim(right=1.25 * max(seconds + theirs))
            panel.legend(fontsize=8, frameon=False, loc="right")
        panel.set_yticks(positions, labels, fontsize=8)
        panel.invert_yaxis()
        panel.set_title(f"{work}, seconds", fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_file(out) as file:
        figure.savefig(file)
