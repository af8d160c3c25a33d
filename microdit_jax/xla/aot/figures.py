"""What was found about a compiled program: a dictionary for JSON, and a table of text."""

import datetime
import json
from pathlib import Path
from typing import Any

import jax

from microdit_jax.files import write_text
from microdit_jax.xla import roofline
from microdit_jax.xla.aot.programs import Program
from microdit_jax.xla.hlo import count as hlo
from microdit_jax.xla.topologies import Topology

# What a program may take of a chip's memory; the rest is the runtime's. GPUs: see presets.py.
USABLE = {"cuda": 0.92, "tpu": 0.98}
DAY = 24 * 3600


def measure(memory: dict[str, Any], cost: dict[str, Any], counts: hlo.Counts) -> dict[str, Any]:
    """Everything that adds up over blocks, of one device and one run: what may be extrapolated.

    Args:
      memory: bytes by the compiler: "arguments", "outputs", "aliased", "temporaries".
      cost: the compiler's own analysis, as far as it gives one.
    """
    collectives: dict[str, dict[str, float]] = {}
    for c in counts.collectives:
        entry = collectives.setdefault(c.kind, {"instructions": 0, "runs": 0, "bytes": 0.0})
        entry["instructions"] += 1
        entry["runs"] += c.times
        entry["bytes"] += c.times * c.num_bytes
    found = {
        "memory": dict(memory),
        "flops": counts.flops,
        "flops_by_type": dict(counts.flops_by_type),
        "bytes_moved": counts.num_bytes,
        "kernels": sum(k.times for k in counts.kernels),
        "uncounted": dict(counts.uncounted),
        "collectives": collectives,
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
    bound: roofline.Bound | None,
    *,
    steps: int | None,
) -> dict[str, Any]:
    """`measure` of the whole program, with what follows from it.

    Args:
      bound: None where the chip's peaks are not known.
      steps: of the stage, for days and dollars; None for a program that is no training step.
    """
    devices, chip = len(topology.devices), topology.chip
    memory = found["memory"]
    memory["peak"] = (
        memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
    )
    if chip is not None:
        usable = USABLE[topology.platform] * chip.memory_bytes
        memory |= {"of": chip.memory_bytes, "usable": usable, "fits": memory["peak"] <= usable}
    forward = program.forward_flops * program.images / devices
    expected = program.passes + program.recomputed
    collectives = found["collectives"]
    # libtpu makes all-reduces of all reduce-scatters.
    summed = "reduce-scatter" if "reduce-scatter" in collectives else "all-reduce"
    moved = sum(collectives.get(kind, {}).get("bytes", 0.0) for kind in ("all-gather", summed))
    needed = sum(program.needed_exchange.values())
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
        "weight_exchange": {
            "moved": moved,
            "needed": needed,
            "ratio": moved / needed if needed else None,
        },
    }
    if bound is not None:
        seconds = bound.hidden
        found["seconds"] = {
            "compute": bound.compute,
            "memory": bound.memory,
            "kernels": bound.kernels,
            "exchange": bound.exchange,
            "bound": seconds,
            "bound_exchange_exposed": bound.exposed,
        }
        found["images_per_second"] = program.images / seconds
        found["mfu_bound"] = forward * program.passes / seconds / chip.bfloat16_flops
        if steps is not None:
            found |= {"steps": steps, "days": steps * seconds / DAY}
            if chip.dollars_per_hour is not None:
                found["dollars"] = found["days"] * 24 * devices * chip.dollars_per_hour
    return found


def header(config_name: str, what: str, topology: Topology, mesh: Any) -> dict[str, Any]:
    """What was compiled, for which chips, with which versions."""
    chip = topology.chip
    return {
        "what": what,
        "config": config_name,
        "topology": topology.name,
        "devices": len(topology.devices),
        "hosts": topology.hosts,
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


def carried(counts: hlo.Counts) -> list[dict[str, Any]]:
    """Each exchange and what it carries, the largest first."""
    rows = [
        {
            "kind": c.kind,
            "times": c.times,
            "bytes": c.num_bytes,
            "devices": len(c.devices),
            "types": sorted(c.bytes_by_type),
            "carries": list(c.carries),
        }
        for c in counts.collectives
    ]
    return sorted(rows, key=lambda row: -row["times"] * row["bytes"])


# ------------------------------------------------------------------------------ text
def table(found: dict[str, Any]) -> str:
    """The report as text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    memory, rows = found["memory"], []

    def add(name: str, value: str):
        rows.append((name, value))

    add("program", f"{found['what']} of {found['config']}")
    add("devices", f"{found['devices']} ({found['topology']}), mesh {mesh}")
    add("parameters", f"{found['parameters']:,}")
    add(
        "batch",
        f"{found['images']:,} images: {found['micro_batches']} x {found['images_at_once']} on "
        "each device",
    )
    parts = ", ".join(f"{k} {memory[k] / 1e9:.2f}" for k in ("arguments", "temporaries"))
    add("memory per device", f"{memory['peak'] / 1e9:.2f} GB ({parts})")
    if "fits" in memory:
        fits = "fits" if memory["fits"] else "DOES NOT FIT"
        add("", f"{fits} into {memory['usable'] / 1e9:.1f} of {memory['of'] / 1e9:.1f} GB")
    add(
        "matrix products",
        f"{found['flops'] / 1e12:.2f} TFLOP, {found['forward_passes']:.3f} forward passes of "
        f"{found['forward_flops'] / 1e12:.2f}; {found['flops_over_analytic']:.4f} of the count",
    )
    if not 0.9 < found["flops_over_analytic"] < 1.2:
        add("", "DOUBTFUL: far from the count; kernels were missed, or more is computed")
    for name, runs in found.get("uncounted", {}).items():  # older reports have none
        add("", f"WITHOUT {runs:,.0f} runs of the kernel {name}, whose operations nobody knows")
    # Below 0 where parts of the backward pass need no products
    add("recomputed", f"{max(found['remat_factor'], 0.0):.3f} forward passes")
    add("bytes moved", f"{found['bytes_moved'] / 1e9:.1f} GB by {found['kernels']:,.0f} kernels")
    for kind, entry in sorted(found["collectives"].items()):
        add(
            kind,
            f"{entry['instructions']:,.0f} instructions, {entry['runs']:,.0f} runs, "
            f"{entry['bytes'] / 1e9:.3f} GB received",
        )
    exchange = found["weight_exchange"]
    if exchange["ratio"] is not None:
        add("weights' exchange", f"{exchange['ratio']:.3f} x the bytes that sharding needs")
    if "seconds" in found:
        rows += _times(found)
    if "compiler_optimal_seconds" in found:
        add("compiler's optimal", f"{found['compiler_optimal_seconds']:.4f} s")
    shallow = ", all of the shallow networks" if "extrapolated" in found else ""
    add("compiled in", f"{found['compile_seconds']:.0f} s{shallow}")
    if "extrapolated" in found:
        add("extrapolated from", found["extrapolated"]["from"])
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _times(found: dict[str, Any]) -> list[tuple[str, str]]:
    s = found["seconds"]
    rows = [
        (
            "time at the peaks",
            f"products {s['compute'] * 1e3:.1f} ms, memory {s['memory'] * 1e3:.1f} ms, kernel by "
            f"kernel {s['kernels'] * 1e3:.1f} ms, exchange {s['exchange'] * 1e3:.1f} ms",
        ),
        (
            "bound",
            f"{s['bound'] * 1e3:.1f} ms, {found['images_per_second']:,.0f} images/s, MFU at most "
            f"{found['mfu_bound']:.1%}",
        ),
    ]
    if "days" in found:
        price = f", {found['dollars']:,.0f} dollars" if "dollars" in found else ""
        rows.append(
            ("stage at the bound", f"{found['steps']:,} steps, {found['days']:.2f} days{price}")
        )
    return rows


def write(found: dict[str, Any], path: Path) -> None:
    """Writes the report as JSON, and its table beside it as .txt."""
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_text(path.with_suffix(".txt"), table(found) + "\n")
