"""Compiled programs kept whole, so that a later start neither traces nor compiles them.

JAX's compilation cache (machine.compilation_cache) spares XLA's work but not the tracing that finds
its key. Here the key is what the caller says the program depends on.

A kept program is machine code, and reading it runs code: so it is only read from the user's own
cache folder, and only if nobody else can have written it.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable

from microdit_jax.errors import UserError
from microdit_jax.files import cache_folder, parse_json, read_bytes, write_bytes
from microdit_jax.machine import compilation_cache

MAX_BYTES = 4 << 30  # of one program; XL/2's training step has about 0.1 GB
FACTS_BYTES = 1 << 20  # of the line that a file begins with, at most


class Kept(NamedTuple):
    """A program that was looked for: `run` is None where there is none to take, for a reason."""

    run: Callable[..., Any] | None
    reason: str


def digest(value: Any) -> str:
    """Returns a short hash of whatever JSON can write."""
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def path_of(key: Mapping[str, Any]) -> Path:
    """Returns where the program with this key is kept."""
    return cache_folder() / "programs" / f"{digest(dict(key))}.bin"


def keep(
    key: Mapping[str, Any], facts: Mapping[str, Any], compiled: jax.stages.Compiled
) -> Path | None:
    """Writes a program into the user's cache folder; returns its path, None if it cannot be kept.

    XLA for CPUs loses functions of a program that itself came from JAX's cache, so `compiled` must
    be compiled by this process (jaxlib 0.10.2: "Function ... not found" at its first run).

    Args:
      key: names the program.
      facts: what else it depends on, by a name that a person understands; `load` compares them.
    Raises:
      UserError: the disk is full, or the folder may not be written.
    """
    try:
        payload, _, out_tree = serialize_executable.serialize(compiled)
    except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError):
        return None  # with constants as arguments, or for a platform that cannot
    results = jax.tree.unflatten(out_tree, [0] * out_tree.num_leaves)
    head = dict(facts) | {"sha256": hashlib.sha256(payload).hexdigest(), "metrics": results[1]}
    path = path_of(key)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    compilation_cache.trim(path.parent)
    write_bytes(path, json.dumps(head, sort_keys=True).encode() + b"\n" + payload, mode=0o600)
    return path


def load(
    key: Mapping[str, Any],
    facts: Mapping[str, Any],
    arguments: Sequence[Any],
    devices: Sequence[Any],
) -> Kept:
    """Looks for a program and loads it, if it depends on the same facts and is the user's own.

    Args:
      key, facts: as `keep` was given them. Call `proven` with the key when the program has run.
      arguments: of the program. Its first result has the structure of the first of them.
      devices: of the program's mesh, in its order.
    """
    path = path_of(key)
    if not path.exists():
        return Kept(None, "")
    if stranger := _stranger(path):
        return Kept(None, stranger)
    try:
        line, _, payload = read_bytes(path, MAX_BYTES).partition(b"\n")
        found = parse_json(line[:FACTS_BYTES])
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, found {type(found).__name__}")
        if hashlib.sha256(payload).hexdigest() != found.pop("sha256"):
            return Kept(None, "its file is damaged")
        metrics = found.pop("metrics")
    except (OSError, UserError, ValueError, KeyError) as error:
        return Kept(None, f"its file cannot be read ({type(error).__name__})")
    for name, value in facts.items():
        if found.get(name) != value:
            return Kept(None, f"{name}: {_short(found.get(name))} there, {_short(value)} here")
    try:
        compiled = serialize_executable.deserialize_and_load(
            payload,
            jax.tree.structure((tuple(arguments), {})),
            jax.tree.structure((arguments[0], metrics)),
            backend=devices[0].client,
            execution_devices=list(devices),
        )
    except Exception as error:  # whatever the runtime says: it is compiled instead
        return Kept(None, f"this machine cannot load it ({str(error).splitlines()[0][:160]})")
    path.rename(_tried(path))
    return Kept(compiled, "")


def proven(key: Mapping[str, Any]) -> None:
    """Puts a program back that `load` returned, once it has run: none fails at two starts."""
    with contextlib.suppress(FileNotFoundError):  # another process has put it back
        _tried(path_of(key)).rename(path_of(key))


def _tried(path: Path) -> Path:
    return path.with_suffix(".tried")


def _stranger(path: Path) -> str:
    """Returns why a file may be another user's; "" where it is this user's own."""
    for one in (path, path.parent):
        about = one.lstat()
        if about.st_uid != os.getuid() or about.st_mode & 0o022:
            return f"others may have written it ({one.name} is not this user's alone)"
    return ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
