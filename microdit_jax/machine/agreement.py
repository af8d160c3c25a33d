"""Facts that the processes of a job must have in common, compared before anything compiles."""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from microdit_jax.errors import Late, UserError, visible
from microdit_jax.files import parse_json
from microdit_jax.machine import hosts, watch

VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
AGREE_SECONDS = 600.0  # for a process to open its data
_SHOWN = 4  # differences in an error
_rounds = itertools.count()


def agree(facts: Mapping[str, Any], *, timeout_seconds: float = AGREE_SECONDS) -> None:
    """Compares facts of all processes; each passes the same names, with values that JSON can hold.

    Raises:
      UserError: on all processes, a fact that differs, with both values and both hosts.
      Late: a process has not come.
    """
    job, number = watch.current(), next(_rounds)
    if job is None:
        return
    store, mine = job.store, {name: visible(value, 200) for name, value in facts.items()}
    store.put(f"facts/{number}/{store.process_id}", json.dumps({"who": job.who(), "facts": mine}))
    if store.process_id:
        # Process 0 answers at its own time-out, and is watched.
        if fault := store.wait_for(f"agreed/{number}"):
            raise hosts.FaultOfFirst(fault)
        return
    fault = _difference(job, number, mine, time.monotonic() + timeout_seconds)
    store.put(f"agreed/{number}", fault)
    if fault:
        raise UserError(fault)


def _difference(job: watch.Watch, number: int, mine: dict[str, str], until: float) -> str:
    for other in range(1, job.store.num_processes):
        text = job.store.wait(f"facts/{number}/{other}", max(1.0, until - time.monotonic()))
        if text is None:
            raise Late(
                f"expected what process {other} works with, found none in time; look at its log, "
                "then start all again"
            )
        found = parse_json(text)
        theirs = found["facts"]
        differing = [
            f"{name} {mine.get(name, 'absent')} on {job.who()} and {theirs.get(name, 'absent')} on "
            f"{found['who']}"
            for name in sorted(mine | theirs)
            if mine.get(name) != theirs.get(name)
        ]
        if differing:
            more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            return (
                f"expected the same on all processes, found {'; '.join(differing[:_SHOWN])}{more}; "
                "start the same command with the same code everywhere"
            )
    return ""


def software() -> dict[str, str]:
    """Returns the versions of what computes, and a hash of this package's source."""
    versions = {f"version of {name}": _version(name) for name in VERSIONS_OF}
    python = ".".join(map(str, sys.version_info[:2]))
    return versions | {"version of Python": python, "source of microdit_jax": source_hash()}


def devices() -> dict[str, str]:
    """Returns this process's devices; opens them."""
    found = jax.local_devices()
    return {"devices": f"{len(found)} of {found[0].device_kind}"}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dictionaries by their keys, "a.b"."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.dumps(value, default=str, sort_keys=True)
    return found


@functools.cache
def source_hash() -> str:
    """Returns a hash of all Python files of this package."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
