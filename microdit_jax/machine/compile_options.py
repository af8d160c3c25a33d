"""XLA's options by platform, each with the reason; docs/notebook.md has the evidence.

The training step is compiled with COMPILE. Options that only a process's environment can set are in
ENVIRONMENT; `python -m microdit_jax.commands.environment` prints them.
"""

import ctypes.util
import importlib.metadata
import os
import re
from typing import TYPE_CHECKING, Any

from microdit_jax.errors import UserError

if TYPE_CHECKING:  # this module answers at once, without JAX
    from jax.sharding import Mesh

PLATFORMS = ("cuda", "tpu", "cpu")

# For each program, by jax.jit(..., compiler_options=...).
COMPILE: dict[str, dict[str, Any]] = {
    "cuda": {
        # Matmuls that share an operand are not merged into one. The modulations of all blocks share
        # one, and so do the keys and values of the captions: to merge them, each step would copy
        # their weights next to each other.
        "xla_gpu_dot_merger_threshold_mb": 0,
    },
    "tpu": {},
    "cpu": {},
}

# For each training step on several slices.
ACROSS_SLICES: dict[str, dict[str, Any]] = {
    "cuda": {
        # Collectives inside a slice and across slices, over links that do not disturb each other,
        # may run at the same time; by default one must end before the next begins.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 512,
        # Each collective starts as soon as it may, which `training.streaming` decides. By default
        # most all-gathers inside a slice start right where their results are awaited.
        "xla_gpu_experimental_collective_start_as_early_as_possible": True,
        # All-gathers are joined into one of up to this size, not of 30 MB: a kernel waits for all
        # that its all-gather was joined with, and two blocks' must not be joined.
        "xla_gpu_all_gather_combine_threshold_bytes": 1_000_000,
    },
    "tpu": {},
    "cpu": {},
}

# Options that compilers of earlier versions of jaxlib refuse.
SINCE: dict[str, tuple[int, ...]] = {
    "xla_gpu_experimental_collective_start_as_early_as_possible": (0, 10, 2),
}

# For each program that is compiled where no device is there to time kernels on.
WITHOUT_A_DEVICE: dict[str, dict[str, Any]] = {
    "cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
    "tpu": {},
    "cpu": {},
}

# For each process.
ENVIRONMENT: dict[str, dict[str, str]] = {
    # XLA takes 75 % of the memory by default; stage 1 with the paper's micro-batch needs 76 %.
    "cuda": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"},
    "tpu": {},
    # A program takes its temporaries from malloc in each call. glibc returns them to the system
    # after it, which clears every page again; huge pages take a fraction of that time.
    "cpu": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}

# Allocator for CPUs, if it is installed. It keeps large blocks for the next call, apart from small
# ones, so that the process does not grow.
TCMALLOC = "tcmalloc_minimal"
WITH_TCMALLOC = {"TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(2**40)}  # no line for each GB
WITHOUT_TCMALLOC = (
    f"lib{TCMALLOC} is not installed, with which training on CPUs is quicker still (Debian, "
    "Ubuntu: apt install libtcmalloc-minimal4); taking huge pages alone"
)


def compiler_options(
    platform: str, *, across_slices: bool = False, without_a_device: bool = False
) -> dict[str, Any]:
    """Returns the options that a program is compiled with.

    Args:
      platform: one of PLATFORMS; "gpu" is "cuda". Others have no options.
      across_slices: True for a program on devices of several slices.
      without_a_device: True where the compiler has no device to time kernels on.
    """
    platform = "cuda" if platform == "gpu" else platform
    chosen = [COMPILE]
    chosen += [ACROSS_SLICES] * across_slices + [WITHOUT_A_DEVICE] * without_a_device
    version = tuple(map(int, re.findall(r"\d+", importlib.metadata.version("jaxlib"))[:3]))
    options = [option for preset in chosen for option in preset.get(platform, {}).items()]
    return {name: value for name, value in options if version >= SINCE.get(name, ())}


def step_options(mesh: "Mesh") -> dict[str, Any]:
    """Returns the options that a training step on a mesh is compiled with."""
    from microdit_jax.machine.slices import slices_of

    across = len(set(slices_of(mesh))) > 1
    return compiler_options(mesh.devices.flat[0].platform, across_slices=across)


def environment(platform: str) -> dict[str, str]:
    """Returns the environment variables for a process on this machine.

    Args:
      platform: one of PLATFORMS.
    Raises:
      UserError: an unknown platform.
    """
    if platform not in PLATFORMS:
        raise UserError(f"presets are for {', '.join(PLATFORMS)}, found {platform!r}")
    library = ctypes.util.find_library(TCMALLOC) if platform == "cpu" else None
    if library is None:
        return ENVIRONMENT[platform]
    others = [name for name in os.environ.get("LD_PRELOAD", "").split() if name != library]
    return {"LD_PRELOAD": " ".join([library, *others])} | WITH_TCMALLOC
