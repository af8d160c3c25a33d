"""The training step as a program that an earlier start has kept, or compiled and kept now."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from microdit_jax.machine import compilation_cache, executables
from microdit_jax.machine.agreement import source_hash
from microdit_jax.machine.compile_options import step_options
from microdit_jax.machine.processor import processor

WORTH_SECONDS = 10.0  # of tracing and compiling; quicker steps are not kept
# Keys of a configuration that no step depends on.
_OUTSIDE = ("eval", "log", "profile", "init_from", "init_weights_from")
_OUTSIDE_TRAIN = (
    "steps", "log_every", "eval_every", "checkpoint_every", "keep_last", "keep_every",
    "max_skipped", "replica_check_every",
)  # fmt: skip
# Settings of JAX that change what is traced.
_JAX = (
    "jax_default_matmul_precision", "jax_enable_x64", "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable", "jax_default_prng_impl", "jax_debug_nans",
)  # fmt: skip
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class SavedStep:
    """A training step that at its first call looks for itself, or is compiled and kept.

    Args:
      step: the step, as `config.make_step` returns it.
      config: with all that was filled in.
      say: prints a line.
    """

    def __init__(
        self, step: Callable[..., Any], config: ConfigDict, mesh: Mesh, say: Callable[[str], None]
    ):
        self._step, self._config, self._mesh, self._say = step, config, mesh, say
        self._program: Callable[..., Any] | None = None

    def __call__(self, state: Any, batch: Any, *held: Any) -> Any:
        """Runs one step."""
        if self._program is None:
            self._program, results = self._first((state, batch, *held))
            return results
        return self._program(state, batch, *held)

    def _first(self, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], Any]:
        if not self._kept_at_all(arguments):
            return self._step, self._step(*arguments)
        key = key_of(self._config, self._mesh)
        facts = facts_of(arguments, step_options(self._mesh))
        began = time.perf_counter()
        run, reason = executables.load(key, facts, arguments, self._mesh.devices.flatten().tolist())
        if run is not None:
            try:
                results = jax.block_until_ready(run(*arguments))
                executables.proven(key)
                took = time.perf_counter() - began
                self._say(f"took the training step that an earlier start kept, {took:.0f} s")
                return run, results
            except (TypeError, ValueError) as error:  # of its arguments, before it takes any
                reason = f"it takes other arguments ({str(error).splitlines()[0][:160]})"
        if reason:
            self._say(f"the training step is compiled, though one is kept: {reason}")
        began, hits = time.perf_counter(), compilation_cache.hits()
        assert isinstance(self._step, jax.stages.Wrapped)
        compiled = self._step.lower(*arguments).compile()
        new = compilation_cache.hits() == hits
        if new and time.perf_counter() - began >= WORTH_SECONDS:
            executables.keep(key, facts, compiled)
        return compiled, compiled(*arguments)

    def _kept_at_all(self, arguments: Sequence[Any]) -> bool:
        """Returns False for steps that are compiled as JAX does it, at each start.

        Of a job's processes some could find a program and others not, while their compilers wait
        for each other. A text tower, a teacher or a base belong to the step as well.
        """
        return (
            compilation_cache.is_enabled()
            and jax.process_count() == 1
            and len(arguments) == 2
            and isinstance(self._step, jax.stages.Wrapped)
        )


def key_of(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """Returns what a step is found by: the configuration, as far as it counts, and the devices."""
    values = config.to_dict()
    values = {k: v for k, v in values.items() if k not in _OUTSIDE}
    values["train"] = {k: v for k, v in values["train"].items() if k not in _OUTSIDE_TRAIN}
    values["data"] = {"captions": values["data"]["captions"]}
    device = mesh.devices.flat[0]
    return {
        "program": "train_step",
        "config": values,
        "mesh": dict(mesh.shape),
        "platform": device.platform,
        "device": device.device_kind,
    }


def facts_of(arguments: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns what a step depends on besides, by names that a line can tell.

    Args:
      arguments: arrays, or their shapes.
      options: XLA's, that it is compiled with.
    """
    shapes = [
        (jax.tree_util.keystr(path), list(np.shape(leaf)), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(arguments))
    ]
    packages = {"jax": jax, "jaxlib": jaxlib, "flax": flax, "optax": optax}
    return {
        **{name: module.__version__ for name, module in packages.items()},
        "code of microdit_jax": source_hash(),
        "processor": list(processor()),
        "options of XLA": {k: str(v) for k, v in sorted(options.items())},
        "flags": {name: os.environ.get(name, "") for name in _FLAGS},
        "settings of JAX": {name: str(jax.config.values.get(name)) for name in _JAX},
        "arguments": executables.digest(shapes),
        "Python": list(sys.version_info[:2]),
    }
