"""Runs a command on hostile input, in a process of its own that cannot take the machine with it."""

import json
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


def assert_refused(
    done: subprocess.CompletedProcess[str], *, status: int = 2, begin: str = "error: "
) -> str:
    """Asserts the status and one line without control characters; returns that line."""
    assert done.returncode == status, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    lines = [line for line in done.stderr.splitlines() if line.startswith(begin)]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert lines[0].isprintable(), ascii(lines[0])
    return lines[0]


def outcomes(call: str, arguments: Sequence[str], cwd: Path) -> list[tuple[int, str]]:
    """Calls "module:function" on each argument, all in one process with the limits above.

    Returns:
      What a command would have ended with for each: the status, and the line that tells why.
    """
    done = run_hostile(["-c", _TRY_EACH, str(ROOT / "tests"), call, *arguments], cwd)
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(arguments)
    return [(status, line) for status, line in found]


_TRY_EACH = """
import importlib, json, sys, traceback
from microdit_jax.commands import boundary
sys.path.append(sys.argv[1])
module, name = sys.argv[2].split(":")
function = getattr(importlib.import_module(module), name)
for argument in sys.argv[3:]:
    try:
        function(argument)
        found = 0, "done"
    except BaseException as error:
        found = boundary.describe(error)
        if found[0] != 2:
            traceback.print_exc()
    print(json.dumps(found), flush=True)
"""
