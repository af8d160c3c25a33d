"""Whether a compiled program fits into memory, asked before it runs, and what to do if not."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from microdit_jax.errors import UserError


def free_host_bytes() -> int | None:
    """Returns the host's memory that is free now; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    (available,) = (line for line in lines if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


def check_host(needed: int, what: str) -> None:
    """Raises UserError if the host has less memory free than something needs.

    Args:
      needed: bytes that are about to be allocated.
      what: how the user asked for it.
    """
    free = free_host_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"{what} needs {needed / 1e9:.3g} GB of the host's memory, found {free / 1e9:.3g} GB "
            "free; ask for fewer"
        )


def free_bytes(device: jax.Device) -> int | None:
    """Memory that is free on a device now; the host's for a CPU; None where nobody says."""
    if device.platform == "cpu":
        return free_host_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def check_fit(compiled: jax.stages.Compiled, *, rows: int, what: str) -> None:
    """Raises UserError, naming the batch that would fit, if a program needs more than is free.

    Args:
      compiled: its arguments are in memory already; results and temporaries are not.
      rows: size of its batch, over all devices.
      what: how the user calls that size.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return
    devices = jax.tree.leaves(compiled.input_shardings)[0].addressable_devices
    device = next(iter(devices))
    sharing = len(devices) if device.platform == "cpu" else 1  # simulated devices share one memory
    needed = sharing * (
        analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    )
    free = free_bytes(device)
    if free is None or needed <= free:
        return
    fitting = int(rows * free / needed)
    fix = (
        f"{what}={fitting} would fit"
        if fitting >= len(devices)
        else "not even one picture a device fits: use dtype bfloat16, or spread the weights (fsdp)"
    )
    raise UserError(
        f"{what}={rows} needs {needed / 1e9:.2f} GB beside the weights, found {free / 1e9:.2f} GB "
        f"free; {fix}"
    )


@contextlib.contextmanager
def out_of_memory(fix: str) -> Iterator[None]:
    """Turns a device's running out of memory into a UserError with the fix."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device ran out of memory; use {fix}") from error
