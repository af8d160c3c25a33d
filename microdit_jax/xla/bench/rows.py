"""One row of the benchmark for each variant: measured, printed, and drawn."""

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
from microdit_jax.models.dit import DiTConfig
from microdit_jax.xla.bench import timing, workloads
from microdit_jax.xla.bench.workloads import Size, Variant, Work

Row = dict[str, Any]


class Reference(Protocol):
    """Another implementation of the same network, timed beside ours (benchmarks/)."""

    def __call__(self, what: str, config: DiTConfig, size: Size) -> Callable[[], Any] | None:
        """Prepares one piece of work; None for work that the other implementation lacks.

        Returns:
          A function that does the work once and returns when it is done.
        """
        ...


class Settings(NamedTuple):
    """Number of timed and untimed turns, the reference, and the folder for HLO and traces."""

    repeats: int
    warm_up: int
    reference: Reference | None = None
    dump: Path | None = None


# What changes a program's speed from outside.
ENVIRONMENT = sorted({"LD_PRELOAD", "XLA_FLAGS"}.union(*compile_options.ENVIRONMENT.values()))


def new(arch: str, input_size: int, size: Size) -> dict[str, Any]:
    """A report without rows: where and on what they are measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "arch": arch,
        "input_size": input_size,
        "size": size._asdict(),
        "rows": [],
    }


def measure(what: str, config: DiTConfig, size: Size, variant: Variant, settings: Settings) -> Row:
    """Compiles one variant and times it in turns with a matrix product and the reference.

    Raises:
      UserError: a variant that cannot run here, or a reference that cannot.
    """
    theirs = settings.reference(what, config, size) if settings.reference else None
    work = workloads.MAKERS[what](config, size, variant)
    gemm, gemm_operations = timing.gemm(variant.dtype)
    runs = [work.run, gemm] + ([theirs] if theirs else [])
    ours, product, *rest = timing.take_turns(
        runs, repeats=settings.repeats, warm_up=settings.warm_up
    )
    if settings.dump:
        _dump(settings.dump / name(what, variant), work)
    rate = work.operations / np.median(ours.seconds) / jax.device_count()
    gemm_rate = gemm_operations / np.median(product.seconds)
    row = {
        "what": what,
        "variant": {key: getattr(variant, key) for key in workloads.MATTERS[what]},
        "seconds": ours.summary(),
        "compile_seconds": work.compile_seconds,
        "operations": work.operations,
        "memory": _memory(work.compiled),
        "gemm_operations_per_second": gemm_rate,
        "share_of_gemm": rate / gemm_rate,
    }
    if rest:
        row["reference_seconds"] = rest[0].summary()
        row["over_reference"] = ours.over(rest[0])
    del work, runs, theirs
    gc.collect()  # before the next variant's state
    return row


def _memory(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes on each device."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def name(what: str, variant: Variant) -> str:
    """A variant's name in tables and of its files."""
    values = dataclasses.asdict(variant)
    return "_".join([what, *(str(values[key]) for key in workloads.MATTERS[what])])


def _dump(folder: Path, work: Work) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "optimised_hlo.txt").write_text(work.compiled.as_text())
        with jax.profiler.trace(str(folder)):
            work.run()


def line(row: Row) -> str:
    """One row as text."""
    seconds, memory = row["seconds"], row["memory"]
    text = "_".join([row["what"], *map(str, row["variant"].values())])
    text = f"{text:44} {seconds['median']:9.4f} s (spread {100 * seconds['spread']:3.0f} %)"
    text += f"  compile {row['compile_seconds']:6.1f} s"
    if memory:
        text += f"  temporaries {memory['temporaries'] / 2**20:8.0f} MiB"
    text += f"  share {100 * row['share_of_gemm']:3.0f} % of "
    text += f"{row['gemm_operations_per_second'] / 1e9:.0f} GFLOP/s"
    if "over_reference" in row:
        over = row["over_reference"]
        text += f"  {over['median']:.2f} x reference [{over['lowest']:.2f}, {over['highest']:.2f}]"
        text += f", lowest times {over['of_lowest']:.2f}"
    return text


def write(report: dict[str, Any], path: Path) -> None:
    """The report as JSON, and, where anything was compiled, a picture beside it.

    Raises:
      UserError: the disk is full.
    """
    write_text(path, json.dumps(report, indent=1) + "\n")
    if report["rows"]:
        draw(report, path.with_suffix(".png"))


def draw(report: dict[str, Any], out: Path) -> None:
    """Medians of all variants as bars, and the reference's beside them."""
    rows = report["rows"]
    works = list(dict.fromkeys(row["what"] for row in rows))
    height = 0.8 + 0.45 * len(rows) + 0.5 * len(works)
    figure = Figure(figsize=(8, height), layout="constrained", dpi=100)
    counts = [sum(row["what"] == work for row in rows) for work in works]
    panels = figure.subplots(len(works), 1, squeeze=False, height_ratios=counts)[:, 0]
    for panel, work in zip(panels, works, strict=True):
        found = [row for row in rows if row["what"] == work]
        places = np.arange(len(found))
        labels = [", ".join(map(str, row["variant"].values())) for row in found]
        seconds = [row["seconds"]["median"] for row in found]
        panel.barh(places, seconds, height=0.4, color="#1b9e77", label="ours")
        if "reference_seconds" in found[0]:
            theirs = [row["reference_seconds"]["median"] for row in found]
            panel.barh(places + 0.4, theirs, height=0.4, color="#888888", label="reference")
            panel.set_xlim(right=1.25 * max(seconds + theirs))
            panel.legend(fontsize=8, frameon=False, loc="right")
        panel.set_yticks(places, labels, fontsize=8)
        panel.invert_yaxis()
        panel.set_title(f"{work}, seconds", fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_file(out) as file:
        figure.savefig(file)
