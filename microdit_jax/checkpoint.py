"""Model folders: parameters by Orbax, the config beside them, and a checksum of every file.

  config.json    what the model is: {"format", "version", "kind", "parameters", KIND: config, ...}
  params/        the parameters, written by Orbax: one uncompressed array a file
  manifest.json  every array's type and shape, every file's size and sha256

Orbax restores a damaged file without a word, so loading checks the manifest first.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from microdit_jax.errors import UserError, disk_errors

FORMAT, VERSION = "microdit_jax.model", 1
CONCURRENT_GB = 1  # held by Orbax while it writes or reads, beside the arrays themselves

Params = dict[str, Any]


def sha256(path: str | os.PathLike) -> str:
    """The file's sha256 in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model(folder: str | os.PathLike, params: Mapping[str, Any], metadata: dict) -> None:
    """Writes a model folder; it takes its name only once it is complete.

    For one process; `params` may live on any of its devices, or in numpy.

    Args:
      folder: must not exist yet.
      params: nested dict of arrays.
      metadata: what the model is, for config.json, with at least "kind".
    Raises:
      UserError: the folder exists, or the disk is full; nothing is left behind.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another name or remove it first")
    paths = dict(_paths(params))
    num_bytes = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in paths.values())
    partial = folder.with_name(f".{folder.name}.partial")
    with disk_errors(folder, num_bytes), _cleared(partial):
        partial.mkdir(parents=True)
        config = {
            "format": FORMAT,
            "version": VERSION,
            "parameters": sum(leaf.size for leaf in paths.values()),
        }
        _write_json(partial / "config.json", config | metadata)
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(partial / "params", args=ocp.args.PyTreeSave(params))
        except ValueError as error:  # TensorStore's, for any failed write
            if "No space left" in str(error):
                raise UserError(f"could not write {folder}: the disk is full; free some") from error
            raise
        arrays = {
            path: [str(np.dtype(leaf.dtype)), list(leaf.shape)] for path, leaf in paths.items()
        }
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        with ThreadPoolExecutor() as pool:
            sums = pool.map(lambda path: [path.stat().st_size, sha256(path)], files)
        names = [path.relative_to(partial).as_posix() for path in files]
        manifest = {"arrays": arrays, "files": dict(zip(names, sums, strict=True))}
        _write_json(partial / "manifest.json", manifest)
        partial.rename(folder)


def load_model(
    folder: str | os.PathLike, *, sharding: Any = None, verify: bool = True
) -> tuple[Params, dict]:
    """Reads a model folder written by save_model, on whatever devices there are now.

    Args:
      sharding: where the parameters go: one jax.sharding.Sharding for all, or a nested dict of them
        like the parameters'; None puts all on the first local device.
      verify: compare every file with its checksum first.
    Returns:
      The parameters (nested dict of jax arrays) and config.json's contents.
    Raises:
      UserError: not a model folder, or of a newer version, or a file is missing or damaged.
    """
    folder = Path(folder).absolute()
    metadata, manifest = read_metadata(folder), _read_json(folder / "manifest.json")
    if verify:
        _verify(folder, manifest["files"])
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    single = isinstance(sharding, jax.sharding.Sharding)
    shardings = {} if single else dict(_paths(sharding))
    abstract: Params = {}
    for path, (dtype, shape) in manifest["arrays"].items():
        *parents, last = path.split("/")
        node = abstract
        for parent in parents:
            node = node.setdefault(parent, {})
        target = sharding if single else shardings[path]
        node[last] = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype), sharding=target)
    with _checkpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(
            item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
        )
        return checkpointer.restore(folder / "params", args=args), metadata


def read_metadata(folder: str | os.PathLike) -> dict:
    """config.json of a model folder, checked to be one this version can read.

    Raises:
      UserError: it is not a model folder, or a newer version's.
    """
    folder = Path(folder).absolute()
    if not (folder / "config.json").is_file() or not (folder / "manifest.json").is_file():
        found = "another folder" if folder.is_dir() else "a file" if folder.exists() else "nothing"
        raise UserError(
            f"expected a model folder (config.json, params/, manifest.json) at {folder}, found "
            f"{found}; convert a checkpoint first: python -m convert --help"
        )
    metadata = _read_json(folder / "config.json")
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise UserError(
            f"expected {FORMAT} version {VERSION} in {folder}, found {metadata.get('format')} "
            f"version {metadata.get('version')}; convert the checkpoint again"
        )
    return metadata


def _verify(folder: Path, files: Mapping[str, list]) -> None:
    """Raises UserError naming every file that is missing or differs from its checksum."""

    def fault(name: str) -> str | None:
        path, (size, digest) = folder / name, files[name]
        if not path.is_file():
            return f"{name} (missing)"
        if path.stat().st_size != size:
            return f"{name} ({path.stat().st_size} bytes instead of {size})"
        return None if sha256(path) == digest else f"{name} (contents changed)"

    with ThreadPoolExecutor() as pool:
        faults = [fault for fault in pool.map(fault, files) if fault]
    if faults:
        raise UserError(
            f"expected the files of {folder} as they were written, found damage in "
            f"{', '.join(faults)}; convert the checkpoint again or restore the folder"
        )


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested dict with their paths, "a/b/c"."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _checkpointer() -> ocp.Checkpointer:
    # One uncompressed file an array: noise-like weights shrink by 8 % only, and against OCDBT the
    # 4.7 GB network is written in a third of the time with 1.4 GB less memory (measured).
    logging.getLogger("absl").addFilter(_no_ocdbt_warning)
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_compression=False,
        save_concurrent_gb=CONCURRENT_GB,
        restore_concurrent_gb=CONCURRENT_GB,
    )
    return ocp.Checkpointer(handler)


def _no_ocdbt_warning(record: logging.LogRecord) -> bool:
    # Orbax looks for OCDBT files to merge even when told to write none, and warns of finding none.
    return "Skipping merge of OCDBT" not in str(record.msg)


@contextlib.contextmanager
def _cleared(partial: Path) -> Iterator[None]:
    """Removes what an interrupted run left of a folder, and what this one leaves on an error."""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_json(path: Path, contents: dict) -> None:
    path.write_text(json.dumps(contents, indent=1) + "\n")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"expected JSON in {path}, found damage ({error}); convert the checkpoint again"
        ) from error


class RunCheckpoints:
    """The training states of one run, <workdir>/checkpoints/<step>/, by Orbax's CheckpointManager.

    Saving is asynchronous: training goes on while the state is written. A state appears whole or
    not at all. A failed save raises at the next call.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2):
        self.folder = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Starts to write the state; a step that is there already is left alone."""
        if step != self.latest_step():
            with disk_errors(self.folder):
                self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, abstract_state: Any) -> Any:
        """The newest state, of the given shapes, types and shardings (`jax.eval_shape`'s result).

        Raises:
          UserError: there is none, or it has other shapes: the config changed since.
        """
        step = self.latest_step()
        if step is None:
            raise UserError(f"expected a checkpoint in {self.folder}, found none; train first")
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"checkpoint {step} in {self.folder} does not fit this config ({error}); use the "
                "config it was trained with or another workdir"
            ) from error

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


RUN_FORMAT = "microdit_jax.run"


def is_run(folder: str | os.PathLike) -> bool:
    """Whether the folder is a training run's workdir."""
    config = Path(folder) / "config.json"
    return config.is_file() and _read_json(config).get("format") == RUN_FORMAT


def write_run_metadata(workdir: str | os.PathLike, metadata: dict) -> None:
    """Writes a run's config.json: what a stranger needs to use its checkpoints."""
    _write_json(
        Path(workdir) / "config.json", {"format": RUN_FORMAT, "version": VERSION} | metadata
    )


def read_run_metadata(workdir: str | os.PathLike) -> dict:
    """config.json of a training run."""
    if not is_run(workdir):
        raise UserError(f"expected a training run (a --workdir) at {workdir}, found none")
    return _read_json(Path(workdir) / "config.json")


def load_run_params(
    workdir: str | os.PathLike, abstract_params: Any, *, ema: bool
) -> tuple[Params, int]:
    """The newest parameters of a training run alone, without its optimiser state.

    Args:
      abstract_params: shapes, types and shardings to restore to.
      ema: the moving average rather than the raw parameters.
    Returns:
      The parameters and the step.
    """
    folder = Path(workdir).absolute() / "checkpoints"
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    if not steps:
        raise UserError(f"expected a checkpoint in {folder}, found none; train first")
    item = {"ema" if ema else "params": abstract_params}
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder / str(max(steps)) / "default", args=args)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint {max(steps)} in {folder} does not hold the model of its config ({error}); "
            "try --ema=false if the run kept no average"
        ) from error
    return restored["ema" if ema else "params"], max(steps)
