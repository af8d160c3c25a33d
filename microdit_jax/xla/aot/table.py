"""A report as text, and its files."""

import json
from pathlib import Path
from typing import Any

from microdit_jax.files import write_text

LINKS = ("inside", "across")  # slices


def render(found: dict[str, Any]) -> str:
    """Formats a report, as `analysis.analyse` returns it."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    memory = found["memory"]
    rows: list[tuple[str, str]] = []

    def add(name: str, value: str) -> None:
        rows.append((name, value))

    add("program", f"{found['what']} of {found['config']}")
    slices = f" in {found['slices']} slices" if found.get("slices", 1) > 1 else ""
    add("devices", f"{found['devices']} ({found['topology']}){slices}, mesh {mesh}")
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
        add("", f"{fits} into {memory['usable'] / 1e9:.1f} of {memory['capacity'] / 1e9:.1f} GB")
    add(
        "matmuls",
        f"{found['flops'] / 1e12:.2f} TFLOP, {found['forward_passes']:.3f} forward passes of "
        f"{found['forward_flops'] / 1e12:.2f}; {found['flops_over_analytic']:.4f} of the "
        "analytic count",
    )
    if not 0.9 < found["flops_over_analytic"] < 1.2:
        add("", "DOUBTFUL: far from the analytic count; kernels were missed, or more is computed")
    for name, runs in found.get("uncounted", {}).items():  # older reports have none
        add("", f"WITHOUT {runs:,.0f} runs of the kernel {name}, whose operations are unknown")
    # Below 0 where parts of the backward pass need no matmuls.
    add("recomputed", f"{max(found['remat_factor'], 0.0):.3f} forward passes")
    add("bytes moved", f"{found['bytes_moved'] / 1e9:.1f} GB by {found['kernels']:,.0f} kernels")
    for kind, entry in sorted(found["collectives"].items()):
        add(
            kind,
            f"{entry['instructions']:,.0f} instructions, {entry['runs']:,.0f} runs, "
            f"{entry['bytes'] / 1e9:.3f} GB received",
        )
    if found.get("slices", 1) > 1:
        add("received", ", ".join(_link(found, name) for name in LINKS))
    ratio = found["weight_communication"]["ratio"]
    if ratio is not None:
        add("weights, gradients", f"{ratio:.3f} x the bytes that sharding needs")
    if "seconds" in found:
        rows += _times(found)
    if "compiler_optimal_seconds" in found:
        add("compiler's estimate", f"{found['compiler_optimal_seconds']:.4f} s")
    shallow = ", all of the shallow networks" if "extrapolated" in found else ""
    add("compiled in", f"{found['compile_seconds']:.0f} s{shallow}")
    if "extrapolated" in found:
        add("extrapolated from", found["extrapolated"]["from"])
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _link(found: dict[str, Any], name: str) -> str:
    """Formats bytes, bandwidth and time over the links inside a slice or the network across."""
    text = f"{found['received'][name] / 1e9:.3f} GB {name} slices"
    if "seconds" not in found:
        return text
    bandwidth = found["chip"]["link_bandwidth" if name == "inside" else "network_bandwidth"]
    return f"{text} ({1e3 * found['seconds'][name]:.1f} ms at {bandwidth / 1e9:g} GB/s)"


def _hidden(found: dict[str, Any], link: str) -> str:
    """Formats how much of the communication inside or across slices is exposed; "" if none is."""
    whole, exposed = found["seconds"][link], found["seconds"][f"exposed_{link}"]
    if not whole:
        return ""
    hidden = max(0.0, whole - exposed)  # no "-0.0" by rounding
    return f"{1e3 * exposed:.1f} ms {link} slices, where {1e3 * hidden:.1f} are hidden"


def _times(found: dict[str, Any]) -> list[tuple[str, str]]:
    ms = {name: f"{1e3 * seconds:.1f} ms" for name, seconds in found["seconds"].items()}
    rows = [
        (
            "roofline",
            f"matmuls {ms['matmuls']}, memory {ms['memory']}, kernel by kernel {ms['kernels']}, "
            f"communication {ms['communication']}",
        ),
        (
            "step time at least",
            f"{ms['lower_bound']}, {found['images_per_second']:,.0f} images/s, MFU at most "
            f"{found['mfu_bound']:.1%}",
        ),
    ]
    if "exposed" in ms:  # older reports have none
        text = f"{ms['exposed']} of communication that the schedule does not hide"
        if "exposed_inside" in ms:
            text += f": {', '.join(filter(None, (_hidden(found, link) for link in LINKS)))}"
        rows.append(("exposed", text))
    if "days" in found:
        price = f", {found['dollars']:,.0f} dollars" if "dollars" in found else ""
        rows.append(
            ("stage at least", f"{found['steps']:,} steps, {found['days']:.2f} days{price}")
        )
    return rows


def write(found: dict[str, Any], path: Path) -> None:
    """Writes a report as JSON, and its table beside it as .txt."""
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_text(path.with_suffix(".txt"), render(found) + "\n")
