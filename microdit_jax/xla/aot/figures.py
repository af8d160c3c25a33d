"""Figures of a compiled program, as the dictionary that a report's JSON holds."""

import datetime
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from microdit_jax.machine.slices import slice_of
from microdit_jax.xla.aot.programs import Program
from microdit_jax.xla.hlo.count import Counts
from microdit_jax.xla.roofline import CollectiveTime, StepTime, is_across
from microdit_jax.xla.topologies import Topology

# Share of a chip's memory that a program may take; the runtime needs the rest. For GPUs it is
# XLA_PYTHON_CLIENT_MEM_FRACTION of machine/compile_options.py.
USABLE = {"cuda": 0.92, "tpu": 0.98}
DAY = 24 * 3600


def measure(
    memory: dict[str, Any], cost: dict[str, Any], counts: Counts, slices: Sequence[int]
) -> dict[str, Any]:
    """Collects the figures of one run on one device that grow linearly with the number of blocks.

    Args:
      memory: bytes by the compiler: "arguments", "outputs", "aliased", "temporaries".
      cost: the compiler's cost analysis: "flops" and "optimal_seconds", if it has them.
      slices: slice of each device, in the mesh's order.
    """
    received = {"inside": 0.0, "across": 0.0}
    collectives: dict[str, dict[str, float]] = {}
    for c in counts.collectives:
        entry = collectives.setdefault(c.kind, {"instructions": 0, "runs": 0, "bytes": 0.0})
        entry["instructions"] += 1
        entry["runs"] += c.times
        entry["bytes"] += c.times * c.num_bytes
        received["across" if is_across(c, slices) else "inside"] += c.times * c.num_bytes
    found = {
        "memory": dict(memory),
        "flops": counts.flops,
        "flops_by_type": dict(counts.flops_by_type),
        "bytes_moved": counts.num_bytes,
        "kernels": sum(k.times for k in counts.kernels),
        "uncounted": dict(counts.uncounted),
        "collectives": collectives,
        "received": received,
    }
    if cost.get("optimal_seconds", -1) > 0:
        found["compiler_optimal_seconds"] = cost["optimal_seconds"]
    if cost.get("flops", 0) > 0:
        found["compiler_flops"] = cost["flops"]
    return found


def complete(
    found: dict[str, Any],
    program: Program,
    topology: Topology,
    time: StepTime | None,
    *,
    steps: int | None,
) -> dict[str, Any]:
    """Adds to `measure` of a whole program what follows from it: memory, ratios, time and price.

    Args:
      time: the step time's lower bounds; None where the chip's peaks are not known.
      steps: training steps of the stage, for days and dollars; None for the sampler.
    """
    devices, chip = len(topology.devices), topology.chip
    memory = found["memory"]
    memory["peak"] = (
        memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
    )
    if chip is not None:
        usable = USABLE[topology.platform] * chip.memory_bytes
        memory |= {
            "capacity": chip.memory_bytes,
            "usable": usable,
            "fits": memory["peak"] <= usable,
        }
    forward = program.forward_flops * program.images / devices
    expected = program.passes + program.recomputed
    collectives, needs = found["collectives"], program.needed_communication
    kinds = set(needs) - {"reduce-scatter"}
    if "reduce-scatter" in needs:  # libtpu turns every one into an all-reduce
        kinds.add("reduce-scatter" if "reduce-scatter" in collectives else "all-reduce")
    moved = sum(collectives.get(kind, {}).get("bytes", 0.0) for kind in kinds)
    needed = sum(needs.values())
    found |= {
        "parameters": program.num_params,
        "images": program.images,
        "micro_batches": program.micro_batches,
        "images_at_once": program.images // devices // program.micro_batches,
        "forward_flops": forward,
        "forward_passes": found["flops"] / forward,
        "forward_passes_expected": expected,
        "flops_over_analytic": found["flops"] / (forward * expected),
        "remat_factor": found["flops"] / forward - program.passes,
        "weight_communication": {
            "moved": moved,
            "needed": needed,
            "ratio": moved / needed if needed else None,
        },
    }
    if time is not None and chip is not None:
        found["seconds"] = {
            "matmuls": time.matmuls,
            "memory": time.memory,
            "kernels": time.kernels,
            "communication": time.communication,
            "inside": time.inside,
            "across": time.across,
            "exposed": time.exposed,
            "exposed_inside": time.exposed_inside,
            "exposed_across": time.exposed_across,
            "lower_bound": time.lower_bound,
            "without_overlap": time.without_overlap,
        }
        found["images_per_second"] = program.images / time.lower_bound
        found["mfu_bound"] = forward * program.passes / time.lower_bound / chip.bfloat16_flops
        if steps is not None:
            found |= {"steps": steps, "days": steps * time.lower_bound / DAY}
            if chip.dollars_per_hour is not None:
                found["dollars"] = found["days"] * 24 * devices * chip.dollars_per_hour
    return found


def header(
    config_name: str, what: str, topology: Topology, mesh: Mesh | AbstractMesh
) -> dict[str, Any]:
    """Describes what was compiled, for which chips, and with which versions."""
    chip = topology.chip
    return {
        "what": what,
        "config": config_name,
        "topology": topology.name,
        "devices": len(topology.devices),
        "slices": len(set(map(slice_of, topology.devices))),
        "mesh": dict(mesh.shape),
        "chip": None
        if chip is None
        else {
            "name": chip.name,
            "bfloat16_flops": chip.bfloat16_flops,
            "memory_bandwidth": chip.memory_bandwidth,
            "link_bandwidth": chip.link_bandwidth,
            "network_bandwidth": chip.network_bandwidth,
            "dollars_per_hour": chip.dollars_per_hour,
            "source": chip.source,
            "price_source": chip.price_source,
        },
        "date": datetime.date.today().isoformat(),
        "versions": {"jax": jax.__version__, "compiler": topology.compiler},
        "compiler_options": topology.compiler_options,
    }


def by_size(
    counts: Counts, slices: Sequence[int], times: Sequence[CollectiveTime] | None
) -> list[dict[str, Any]]:
    """Lists every collective with what it carries, the one that moves most bytes first.

    Args:
      slices: slice of each device, in the mesh's order.
      times: of each collective; None where the chip's peaks are not known.
    """
    rows: list[dict[str, Any]] = [
        {
            "kind": c.kind,
            "times": c.times,
            "bytes": c.num_bytes,
            "devices": len(c.devices),
            "slices": len({slices[device] for device in c.devices}),
            "types": sorted(c.bytes_by_type),
            "carries": list(c.carries),
        }
        for c in counts.collectives
    ]
    for row, time in zip(rows, times or (), strict=times is not None):
        row["seconds"] = {"own": time.seconds, "beside": time.beside, "exposed": time.exposed}
    return sorted(rows, key=lambda row: -row["times"] * row["bytes"])
