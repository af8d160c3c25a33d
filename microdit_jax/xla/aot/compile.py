"""Compiles a program for a topology and counts it; programs compiled before come from a cache."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from microdit_jax.errors import UserError
from microdit_jax.files import cache_folder, disk_errors, parse_json
from microdit_jax.machine import compilation_cache
from microdit_jax.xla import roofline
from microdit_jax.xla.aot import figures
from microdit_jax.xla.aot.programs import Program
from microdit_jax.xla.hlo.count import count
from microdit_jax.xla.topologies import Topology

PROGRESS_EVERY = 30  # seconds


class DoesNotFit(UserError):
    """The compiler refused a program because it needs too much memory."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Figures of one compiled program.

    Attributes:
      figures: `figures.measure`, and the seconds of tracing and compiling.
      time: lower bounds of the step time; None where the chip's peaks are not known.
      collectives: `figures.by_size`.
    """

    figures: dict[str, Any]
    time: roofline.StepTime | None
    collectives: list[dict[str, Any]]


def compile_and_count(
    program: Program,
    topology: Topology,
    label: str,
    dump: Path | None,
    keep: Callable[[jax.stages.Compiled], None] | None = None,
) -> Compiled:
    """Traces, compiles and counts a program.

    Args:
      label: name in progress lines and of the dumped file.
      dump: folder for the optimised HLO, or None.
      keep: is given the compiled program, which then comes from no cache.
    Raises:
      DoesNotFit: the program needs more memory than a device has.
    """
    start = time.monotonic()
    with progress(f"{label}: tracing"):
        lowered = program.lower()
    traced = time.monotonic() - start
    path = _cache_path(lowered, topology)
    found = _read_cache(path) if keep is None else None
    if found is None:
        with progress(f"{label}: compiling for {topology.name}"), _memory_refusals(program):
            found = _compile(lowered, topology, keep)
        _write_cache(path, found)
    else:
        say(f"{label}: compiled before, in {found['compile_seconds']:.0f} s")
    if dump is not None:
        file = dump / f"{label.replace(', ', '_').replace(' ', '_')}.hlo.txt"
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(found["text"])
    with progress(f"{label}: counting"):
        counts = count(found["text"])
        chip, slices = topology.chip, program.slices
        known = roofline.is_known(chip, slices)
        step_time = roofline.step_time(counts, chip, slices) if known else None
        times = roofline.collective_times(counts, chip, slices) if known else None
    seconds = {"trace_seconds": traced, "compile_seconds": found["compile_seconds"]}
    measured = figures.measure(found["memory"], found["cost"], counts, program.slices)
    return Compiled(measured | seconds, step_time, figures.by_size(counts, slices, times))


def _compile(
    lowered: jax.stages.Lowered,
    topology: Topology,
    keep: Callable[[jax.stages.Compiled], None] | None,
) -> dict[str, Any]:
    """Compiles a program; returns its optimised HLO, and its memory and cost by the compiler."""
    start = time.monotonic()
    with contextlib.nullcontext() if keep is None else compilation_cache.unused():
        compiled = lowered.compile(compiler_options=topology.compiler_options)
    seconds = time.monotonic() - start
    if keep is not None:
        keep(compiled)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None, f"no memory analysis for {topology.platform}"
    return {
        "text": compiled.as_text(),
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        "cost": {key: cost[key] for key in ("flops", "optimal_seconds") if key in cost},
        "compile_seconds": seconds,
    }


@contextlib.contextmanager
def _memory_refusals(program: Program) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(
            f"{program.images} images in {program.micro_batches} micro-batches do not fit "
            f"({str(error).splitlines()[0][:160]}); use a smaller train.micro_batch_size, "
            "model.options.remat=block or a wider mesh.fsdp"
        ) from error


# ------------------------------------------------------------------------------ cache
# JAX's own cache keeps no programs for devices that are not there.
def _cache_path(lowered: jax.stages.Lowered, topology: Topology) -> Path | None:
    """Names a program's file in the cache, by a hash of all it depends on; None without caches."""
    # JAX makes this attribute at run time.
    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    parts = (
        lowered.as_text(),
        topology.name,
        json.dumps(topology.compiler_options, sort_keys=True),
        os.environ.get("XLA_FLAGS", ""),
        topology.compiler,
    )
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return cache_folder() / "aot" / f"{key}.json.gz"


def _read_cache(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        return parse_json(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError):  # absent, or cut off
        return None


def _write_cache(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(json.dumps(found).encode(), compresslevel=1))


# ------------------------------------------------------------------------------ progress
def say(text: str) -> None:
    """Prints a line of progress to stderr; stdout is for the report."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Says how long something has been running, every half minute and at its end."""
    done, start = threading.Event(), time.monotonic()

    def watch():
        while not done.wait(PROGRESS_EVERY):
            say(f"{what}, {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    say(f"{what}: {time.monotonic() - start:.1f} s")
