"""Runs a command on hostile input, in a process of its own that cannot take the machine with it."""

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESS_SPACE = 4 << 30  # bytes
SECONDS = 30


def run_hostile(
    arguments: Sequence[str], cwd: Path, *, seconds: float = SECONDS, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python *arguments` with 4 GB of address space and within 30 s.

    Returns:
      The finished process, with returncode, stdout and stderr; a negative returncode is the signal
      that ended it. A process that takes longer raises subprocess.TimeoutExpired.
    """

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    # One simulated device: eight would take more address space than the file that is tried.
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=surroundings | environment,
        preexec_fn=limit,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def assert_refused(done: subprocess.CompletedProcess[str]) -> str:
    """Asserts status 2 and one line without control characters; returns that line."""
    assert done.returncode == 2, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert lines[0].isprintable(), ascii(lines[0])
    return lines[0]
