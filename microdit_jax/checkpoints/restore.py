"""Reading the steps of a training run: which are there, which are good, and their arrays."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from microdit_jax.checkpoints import packing
from microdit_jax.checkpoints.model_folder import reading_errors
from microdit_jax.checkpoints.step_folders import steps_of
from microdit_jax.errors import UserError
from microdit_jax.files.attempts import say
from microdit_jax.machine import hosts
from microdit_jax.trees import flatten, unflatten

RESTORE_GB = 8  # held by Orbax while it reads, beside the arrays themselves


def steps_on_disk(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of a run that were written whole, oldest first; not checked for damage."""
    return steps_of(workdir).steps()


def good_step(workdir: str | os.PathLike, step: int | None = None) -> tuple[int, dict]:
    """Finds the newest undamaged step, or checks `step`, and reads its metadata.

    Process 0 checks for all, and prints a line if a step is damaged.

    Raises:
      UserError: there is no step, or none without damage.
    """
    stored = steps_of(workdir)
    folder = stored.name

    def choose() -> list:
        there = list(stored.steps())
        if not there:
            which = "a checkpoint" if step is None else f"checkpoint {step}"
            raise UserError(f"expected {which} in {folder}, found none; train first")
        steps = [number for number in there if step in (None, number)]
        if not steps:
            raise UserError(
                f"expected checkpoint {step} in {folder}, found steps "
                f"{', '.join(map(str, there))}; give one of these"
            )
        faults = []
        for number in reversed(steps):
            if fault := stored.fault(number):
                faults.append(f"step {number} is damaged: {fault}")
                continue
            if faults:
                say(f"{folder}: {'; '.join(faults)}; using step {number}")
            return [number, stored.metadata(number)]
        raise UserError(
            f"expected a checkpoint in {folder} as it was written, found {'; '.join(faults)}; "
            "restore the folder from a copy, or start again in another workdir"
        )

    number, metadata = hosts.from_first("check the checkpoints", choose)
    return number, metadata


def restore_state(folder: Path | epath.Path, abstract: Any, *, partial: bool) -> Any:
    """Restores the state of a step, or a part, with `abstract`'s shapes, dtypes and shardings.

    Raises:
      UserError: arrays are missing, left over (unless `partial`), or of other shapes or dtypes; a
        part may be restored to another dtype.
    """
    with reading_errors(folder):
        return _restore(folder, abstract, partial)


def _restore(folder: Path | epath.Path, abstract: Any, partial: bool) -> Any:
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=RESTORE_GB)
    stored, expected = handler.metadata(epath.Path(folder / "state")), flatten(abstract)
    index = packing.read_index(stored.custom_metadata)
    large = {path: leaf for path, leaf in flatten(stored.tree).items() if hasattr(leaf, "shape")}
    rows = {path: large.pop(path) for path in packing.rows_of(index)}
    _check_fit(folder, _shapes_and_dtypes(large | index), _shapes_and_dtypes(expected), partial)
    wanted = {path: leaf for path, leaf in expected.items() if path in large}
    for path in packing.rows_of(path for path in expected if path in index):
        wanted[path] = jax.ShapeDtypeStruct(rows[path].shape, rows[path].dtype)  # to NumPy
    # A checkpoint that packs nothing has the state's own tree, with lists for its tuples.
    item = unflatten(wanted) if index else abstract
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,  # _check_fit has compared the trees
    )
    with ocp.Checkpointer(handler) as checkpointer:
        arrays = flatten(checkpointer.restore(folder / "state", args=args))
    leaves = [
        packing.unpack(arrays[packing.row_of(path)], index[path], leaf)
        if path in index
        else arrays[path]
        for path, leaf in expected.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _shapes_and_dtypes(leaves: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the shape and dtype of each array."""
    return {path: (tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for path, leaf in leaves.items()}


def _check_fit(folder: Path | epath.Path, found: dict, expected: dict, partial: bool) -> None:
    if partial:
        found = {path: (*found[path][:1], expected[path][1]) for path in expected if path in found}
    differing = sorted(path for path in found | expected if found.get(path) != expected.get(path))
    if differing:
        path = differing[0]
        raise UserError(
            f"checkpoint {folder} does not fit this config: expected {path} "
            f"{_in_words(expected.get(path))}, found {_in_words(found.get(path))} "
            f"({len(differing)} arrays differ); use the config it was trained with or another "
            "workdir"
        )


def _in_words(array: tuple | None) -> str:
    return "absent" if array is None else f"{array[1]} {array[0]}"
