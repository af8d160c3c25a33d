"""XLA's options by platform, each with the reason; the evidence is in docs/performance.md.

The training step is compiled with COMPILE. What only a process's environment can set,
`python -m microdit_jax.commands.environment` prints.
"""

import ctypes.util
import os
from typing import Any

from microdit_jax.errors import UserError

PLATFORMS = ("cuda", "tpu", "cpu")

# Per program, by jax.jit(..., compiler_options=...).
COMPILE: dict[str, dict[str, Any]] = {
    "cuda": {
        # Products that share an operand are not merged into one: all blocks' modulations and
        # captions' keys and values do, and each step would copy their weights next to each other.
        "xla_gpu_dot_merger_threshold_mb": 0,
    },
    "tpu": {},
    "cpu": {},
}

# Per program, only where no device is there to time kernels on.
WITHOUT_A_DEVICE: dict[str, dict[str, Any]] = {
    "cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
    "tpu": {},
    "cpu": {},
}

# Per process.
ENVIRONMENT: dict[str, dict[str, str]] = {
    # XLA takes 75 % of the memory by default; stage 1 with the paper's micro-batch needs 76 %.
    "cuda": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"},
    "tpu": {},
    # A program takes its temporaries from malloc at each call, and glibc's gives them back to the
    # system, which clears each page anew: with huge pages in a fraction of the time.
    "cpu": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}

# Where this allocator is installed it is taken for CPUs: it keeps large blocks for the next call,
# apart from small ones, so that the process does not grow.
TCMALLOC = "tcmalloc_minimal"
WITH_TCMALLOC = {"TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(2**40)}  # it would tell of each GB
WITHOUT_TCMALLOC = (
    f"lib{TCMALLOC} is not installed, with which training on CPUs is quicker still (Debian, "
    "Ubuntu: apt install libtcmalloc-minimal4); taking huge pages alone"
)


def compiler_options(platform: str, *, without_a_device: bool = False) -> dict[str, Any]:
    """What a program is compiled with.

    Args:
      platform: one of PLATFORMS; "gpu" is "cuda". Others get nothing.
    """
    platform = "cuda" if platform == "gpu" else platform
    return COMPILE.get(platform, {}) | (
        WITHOUT_A_DEVICE.get(platform, {}) if without_a_device else {}
    )


def environment(platform: str) -> dict[str, str]:
    """What a process must know from its start, on this machine.

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
