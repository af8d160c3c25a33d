"""The CPU of this machine: its name and the width of its vectors, by which speeds differ."""

import platform
from pathlib import Path
from typing import NamedTuple

# The widest first, by the names that Linux has for them.
VECTORS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("asimd", "NEON"))
LARGEST = 1 << 20  # bytes read of the list of processors


class Processor(NamedTuple):
    """Name of the CPU, and its vector instructions; "" where the system does not say."""

    name: str
    vectors: str


def processor(listed: Path = Path("/proc/cpuinfo")) -> Processor:
    """Describes the first CPU that the system lists."""
    try:
        with listed.open(errors="replace") as file:
            lines = file.read(LARGEST).split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        lines = []
    pairs = (line.partition(":") for line in lines)
    fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
    flags = set((fields.get("flags") or fields.get("features", "")).split())
    vectors = next((name for flag, name in VECTORS if flag in flags), "")
    return Processor(fields.get("model name") or platform.processor(), vectors)
