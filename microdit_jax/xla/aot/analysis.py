"""Analyses a run configuration's program on a topology, whole or extrapolated over its depth."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from microdit_jax import sharding
from microdit_jax.machine import executables, slices
from microdit_jax.models.config import DiTConfig
from microdit_jax.training import config as run_config
from microdit_jax.training import saved_step
from microdit_jax.xla import roofline
from microdit_jax.xla.aot import figures, programs, shallow
from microdit_jax.xla.aot.compile import Compiled, compile_and_count, say
from microdit_jax.xla.topologies import Topology

NETWORK_OPTIONS = ("input_size", "dtype", "attention", "moe_dispatch", "remat")


@dataclasses.dataclass(frozen=True)
class CompileRequest:
    """A program to compile, and for which devices.

    Attributes:
      name: name of the configuration, for the report.
      what: "train_step" or "sampler".
      images: images that the sampler makes at a time, over all devices.
      start_step: step of the run at which the stage starts, for its days and dollars.
      reduced_depth: compile shallow networks and extrapolate.
      dump: folder for the optimised HLO, or None.
      save: keep the training step in the user's cache folder, where training looks for it.
    """

    config: ConfigDict
    topology: Topology
    name: str
    what: str = "train_step"
    images: int = 64
    start_step: int = 0
    reduced_depth: bool = False
    dump: Path | None = None
    save: bool = False


def analyse(request: CompileRequest) -> dict[str, Any]:
    """Compiles a program and returns its report: `figures.header`, `complete` and `by_size`.

    Raises:
      UserError: the configuration cannot be run there.
      DoesNotFit: the program needs more memory than a device has.
    """
    config, topology = request.config, request.topology
    mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
    training, steps = request.what == "train_step", None
    if training:
        program = programs.training(config, mesh)
        steps = config.train.steps - request.start_step
    else:
        program = programs.sampling(config, mesh, images=request.images)
    if warning := slices.crossing_warning(mesh, 4 * program.num_params):  # float32
        say(f"warning: {warning}")
    if request.reduced_depth and training:
        compiled = _extrapolated(request, mesh)
    else:
        keep = functools.partial(_keep, request, mesh, program) if request.save else None
        compiled = compile_and_count(program, topology, request.what, request.dump, keep)
    found = figures.complete(compiled.figures, program, topology, compiled.time, steps=steps)
    options = config.model.options
    network = {key: options[key] for key in NETWORK_OPTIONS if key in options}
    return (
        figures.header(request.name, request.what, topology, mesh)
        | {"network": {"arch": config.model.arch} | network}
        | found
        | {"collectives_by_size": compiled.collectives}
    )


def _keep(
    request: CompileRequest, mesh: Mesh, program: programs.Program, compiled: jax.stages.Compiled
) -> None:
    """Keeps a training step for `train_main.py` on such a machine, and says where."""
    options = request.topology.compiler_options
    key = saved_step.key_of(request.config, mesh)
    path = executables.keep(key, saved_step.facts_of(program.arguments, options), compiled)
    say("this program cannot be saved" if path is None else f"saved: {path}")


def _extrapolated(request: CompileRequest, mesh: Mesh) -> Compiled:
    """Extrapolates from shallow networks; the collectives are those of the last one compiled."""
    config = request.config
    compiled: dict[DiTConfig, Compiled] = {}
    cfg = run_config.model_config(config)
    parts = shallow.terms(cfg, config.train.mask_ratio, programs.CLIP_TOKENS)

    def measure(network: DiTConfig) -> dict[str, Any]:
        if network not in compiled:
            compiled[network] = compile_and_count(
                programs.training(shallow.with_network(config, network), mesh),
                request.topology,
                f"mixer {network.patch_mixer_depth}, backbone {network.depth}",
                request.dump,
            )
        one = compiled[network]
        return one.figures | ({"time": dataclasses.asdict(one.time)} if one.time else {})

    found = shallow.extrapolate(parts, measure)
    time = found.pop("time", None)
    if time is not None:
        for name in ("exposed_inside", "exposed_across"):  # no sums over blocks, unlike the rest
            time[name] = max(0.0, time[name])
    # These seconds were spent, all of them; nothing is extrapolated.
    for name in ("trace_seconds", "compile_seconds"):
        found[name] = sum(one.figures[name] for one in compiled.values())
    weights = " + ".join(f"{part.weight:.2f} x {part.name}" for part in parts)
    found["extrapolated"] = {"from": weights}
    return Compiled(
        found,
        roofline.StepTime(**time) if time else None,
        compiled[parts[-1].network].collectives,
    )
