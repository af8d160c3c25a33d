"""Orbax's manager of a run's steps: what it keeps, and what must be there before one counts."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from microdit_jax.checkpoints.step_folders import StepFolders


class Manager(ocp.CheckpointManager):
    """Orbax's manager, which tells of a failed write before it waits for the other processes.

    Theirs is the wait for this one's part: without that nobody would learn of it for half an hour.

    Attributes:
      failed: called with the error, in a thread.
    """

    failed: Callable[[Exception], None] = staticmethod(lambda error: None)

    def _finalize(self, step: int, steps_to_remove: list[int]) -> None:
        try:
            self._non_blocking_metadata_store.wait_until_finished()
            self._wait_for_checkpointers()
        except Exception as error:
            self.failed(error)
            raise
        super()._finalize(step, steps_to_remove)

    def reached_preemption(self, step: int) -> bool:
        """Returns False: the training loop asks (machine.signals), in all processes alike."""
        return False


def make_manager(
    folders: StepFolders,
    keep_last: int,
    keep_every: int,
    timeout_seconds: float,
    writers: Callable[[], set[int]],
) -> Manager:
    """Makes the manager of a run's steps.

    Args:
      writers: tells which processes write a part of the step that is being saved.
    """
    keep: list[policies.PreservationPolicy] = [policies.LatestN(keep_last)]
    if keep_every:
        keep.append(policies.EveryNSteps(keep_every))

    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
        async_options=ocp.AsyncOptions(
            timeout_secs=max(1, int(timeout_seconds)),
            # Called on process 0 when all files are written, before what commits them.
            post_finalization_callback=lambda: folders.seal(writers()),
        ),
    )
    # OCDBT packs many arrays and shards into few files; weights do not compress (8 % at a third of
    # the speed, measured).
    # Devices that hold copies of one array can each write a part of it, which compiles a program
    # for each part: only for large arrays (10 s less at a run's first save, measured).
    # Shardings are not stored, since a run restores to its own; they would take a quarter of a
    # small save's time.
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=64 * 2**20, enable_write_sharding_file=False
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
        ),
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, handler)
    registry.add("metadata", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return Manager(folders.path, options=options, handler_registry=registry)


def writers_of(arrays: Any) -> set[int]:
    """Returns the processes that hold the first copy of a shard, and so write it."""
    found, seen = {0}, set()
    for leaf in jax.tree.leaves(arrays):
        if len(found) == jax.process_count() or not isinstance(leaf, jax.Array):
            continue
        if (leaf.sharding, leaf.shape) not in seen:
            seen.add((leaf.sharding, leaf.shape))
            found |= {s.device.process_index for s in leaf.global_shards if s.replica_id == 0}
    return found
