"""Memory that is free, and errors that say what to do before too much of it is asked for."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from microdit_jax.errors import MORE, UserError


def free_bytes(
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]  # JAX assigns the class to a name
) -> int | None:
    """Returns the memory in bytes that is free on a device now; None where it is not known."""
    if device.platform == "cpu":
        return free_host_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def free_host_bytes() -> int | None:
    """Returns the memory in bytes that is free on this host now; None where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    (available,) = (line for line in lines if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


def check_host(num_bytes: int, *, what: str, fix: str) -> None:
    """Raises UserError where something needs more memory than this host has free; call it first.

    Linux promises more memory than there is and kills the process that uses it.

    Args:
      num_bytes: what it will take, at least.
      what: how the user calls it, with the size asked for.
      fix: what to ask for instead.
    """
    free = free_host_bytes()
    if free is not None and num_bytes > free:
        raise UserError(
            f"{what} needs {num_bytes / 1e9:,.1f} GB of memory, found {free / 1e9:,.1f} GB free; "
            f"{fix}"
        )


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
        else "not even one image a device fits: use dtype bfloat16, or spread the weights (fsdp)"
    )
    raise UserError(
        f"{what}={rows} needs {needed / 1e9:.2f} GB beside the weights, found {free / 1e9:.2f} GB "
        f"free; {fix}"
    )


@contextlib.contextmanager
def out_of_memory(fix: str) -> Iterator[None]:
    """Turns an error of a device that ran out of memory into a UserError with the fix."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device ran out of memory; use {fix}; {MORE}") from error
