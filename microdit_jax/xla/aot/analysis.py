"""Compiles a run configuration's program for a topology, counts it, and searches what fits."""

import bisect
import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from microdit_jax import sharding
from microdit_jax.commands import cli
from microdit_jax.errors import UserError
from microdit_jax.files import disk_errors
from microdit_jax.models.config import DiTConfig
from microdit_jax.training import config as run_config
from microdit_jax.xla import roofline
from microdit_jax.xla.aot import figures, programs, shallow
from microdit_jax.xla.aot.programs import Program
from microdit_jax.xla.hlo import count as hlo
from microdit_jax.xla.topologies import Topology

SIGN_OF_LIFE = 30  # seconds
SETTINGS = ("input_size", "dtype", "attention", "moe_dispatch", "remat")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
      name: of the configuration, for the report.
      what: "train_step" or "sampler".
      images: that the sampler draws at a time, over all devices.
      start_step: step of the run at which the stage starts, for its days and dollars.
      reduced_depth: compile shallow networks and extrapolate.
      dump: folder for the optimised HLO, or None.
    """

    config: ConfigDict
    topology: Topology
    name: str
    what: str = "train_step"
    images: int = 64
    start_step: int = 0
    reduced_depth: bool = False
    dump: Path | None = None


class DoesNotFit(UserError):
    """The compiler refused a program for its memory."""


def analyse(request: Request) -> dict[str, Any]:
    """The report of one program on one topology, as `figures.complete` has it.

    Raises:
      UserError: it cannot be run there, or the compiler finds that it does not fit.
    """
    config, topology = request.config, request.topology
    mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
    training, steps = request.what == "train_step", None
    if training:
        program = programs.training(config, mesh)
        steps = config.train.steps - request.start_step
    else:
        program = programs.sampling(config, mesh, images=request.images)
    if request.reduced_depth and training:
        found, bound, exchanges = _reduced(request, mesh)
    else:
        found, bound, exchanges = _compile(program, request, request.what)
    found = figures.complete(found, program, topology, bound, steps=steps)
    options = config.model.options
    settings = {key: options[key] for key in SETTINGS if key in options}
    return (
        figures.header(request.name, request.what, topology, mesh)
        | {"network": {"arch": config.model.arch} | settings}
        | found
        | {"exchanges": exchanges}
    )


def _compile(
    program: Program, request: Request, label: str
) -> tuple[dict[str, Any], roofline.Bound | None, list[dict[str, Any]]]:
    """Figures, bound and exchanges of one program."""
    topology, start = request.topology, time.monotonic()
    with alive(f"{label}: tracing"):
        lowered = program.lower()
    traced = time.monotonic() - start
    kept = _cache_path(lowered, topology)
    found = _cached(kept)
    if found is None:
        with alive(f"{label}: compiling for {topology.name}"), _memory_refusals(program):
            found = _compiled(lowered, topology)
        _keep(kept, found)
    else:
        say(f"{label}: compiled before, in {found['compile_seconds']:.0f} s")
    if request.dump is not None:
        path = request.dump / f"{label.replace(', ', '_').replace(' ', '_')}.hlo.txt"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found["text"])
    with alive(f"{label}: counting"):
        counts = hlo.count(found["text"])
    counted = figures.measure(found["memory"], found["cost"], counts)
    counted |= {"trace_seconds": traced, "compile_seconds": found["compile_seconds"]}
    known = topology.chip is not None and topology.chip.memory_bandwidth > 0
    bound = roofline.bound(counts, topology) if known else None
    return counted, bound, figures.carried(counts)


def _compiled(lowered: jax.stages.Lowered, topology: Topology) -> dict[str, Any]:
    """What is kept of a compiled program: its text, memory and costs by the compiler."""
    start = time.monotonic()
    compiled = lowered.compile(compiler_options=topology.compiler_options)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "text": compiled.as_text(),
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        "cost": {key: cost[key] for key in ("flops", "optimal_seconds") if key in cost},
        "compile_seconds": time.monotonic() - start,
    }


# JAX's own cache keeps no programs for devices that are not there.
def _cache_path(lowered: jax.stages.Lowered, topology: Topology) -> Path | None:
    """Where a program's figures are kept; None where caches are off."""
    if not jax.config.jax_enable_compilation_cache:
        return None
    parts = (
        lowered.as_text(),
        topology.name,
        json.dumps(topology.compiler_options, sort_keys=True),
        os.environ.get("XLA_FLAGS", ""),
        topology.compiler,
    )
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return cli.cache_folder() / "aot" / f"{key}.json.gz"


def _cached(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError):  # not there, or cut off
        return None


def _keep(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(json.dumps(found).encode(), compresslevel=1))


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


def _reduced(
    request: Request, mesh: Mesh
) -> tuple[dict[str, Any], roofline.Bound | None, list[dict[str, Any]]]:
    """The same, extrapolated; the exchanges are those of the deepest network compiled."""
    config, done = request.config, {}
    cfg = run_config.model_config(config)
    parts = shallow.terms(cfg, config.train.mask_ratio, programs.CLIP_TOKENS)

    def of_network(network: DiTConfig) -> dict[str, Any]:
        if network not in done:
            program = programs.training(shallow.with_network(config, network), mesh)
            label = f"mixer {network.patch_mixer_depth}, backbone {network.depth}"
            done[network] = _compile(program, request, label)
        found, bound, _ = done[network]
        return found if bound is None else found | {"bound": dataclasses.asdict(bound)}

    found = shallow.extrapolate(parts, of_network)
    bound = roofline.Bound(**found.pop("bound")) if "bound" in found else None
    # Of these the sum was spent, nothing is extrapolated.
    for name in ("trace_seconds", "compile_seconds"):
        found[name] = sum(one[name] for one, *_ in done.values())
    weights = " + ".join(f"{part.weight:.2f} x {part.name}" for part in parts)
    found["extrapolated"] = {"from": weights}
    return found, bound, done[parts[-1].network][2]


# ------------------------------------------------------------------------------ search
def find(request: Request) -> dict[str, Any]:
    """The report of the largest train.micro_batch_size that fits, with all that was "tried".

    Raises:
      UserError: not even one image at a time fits.
    """
    config, topology = request.config.copy_and_resolve_references(), request.topology
    request = dataclasses.replace(request, config=config)
    share = config.train.batch_size // len(topology.devices)
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    fitting, too_large, best, tried, memory = -1, len(sizes), None, {}, None
    while too_large - fitting > 1:
        i = _promising(sizes, memory) if memory or not tried else (fitting + too_large) // 2
        i = min(max(i, fitting + 1), too_large - 1)
        config.train.micro_batch_size = sizes[i]
        try:
            found = analyse(request)
        except DoesNotFit:
            found = None
        memory = found["memory"] | {"size": sizes[i]} if found else memory
        fits = found is not None and memory.get("fits", True)
        tried[sizes[i]] = found and memory["peak"]
        say(f"micro-batch {sizes[i]}: {'fits' if fits else 'does not fit'}")
        if fits:
            fitting, best = i, found
        else:
            too_large = i
    if best is None:
        raise UserError(
            f"not even one image at a time fits on {topology.name}; use "
            "model.options.remat=block, more chips, or a wider mesh.fsdp"
        )
    return best | {"tried": tried}


def _promising(sizes: list[int], memory: dict[str, Any] | None) -> int:
    """Index of the largest size that should fit, by the memory of one "size".

    What a program holds beside its arguments is all but linear in the images at a time. Before one
    is known it is the last: where that fits, one compilation is all.
    """
    if memory is None:
        return len(sizes) - 1
    for_each = (memory["peak"] - memory["arguments"]) / memory["size"]
    return bisect.bisect(sizes, (memory["usable"] - memory["arguments"]) / for_each) - 1


# ------------------------------------------------------------------------------ progress
def say(text: str) -> None:
    """A line to whoever waits; the report alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def alive(what: str) -> Iterator[None]:
    """Says what is going on and for how long, every half minute and at the end."""
    done, start = threading.Event(), time.monotonic()

    def watch():
        while not done.wait(SIGN_OF_LIFE):
            say(f"{what}, {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    say(f"{what}: {time.monotonic() - start:.1f} s")
