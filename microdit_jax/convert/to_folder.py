"""Converts a PyTorch or safetensors file to a model folder, and reports on the way."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tqdm

from microdit_jax.checkpoints.model_folder import read_metadata, save_model
from microdit_jax.convert.inputs import Input, describe_source, find_input, read_tensors
from microdit_jax.convert.keymap import constant_weights
from microdit_jax.convert.kinds import Kind
from microdit_jax.convert.state_dict import StateDict
from microdit_jax.errors import LONGEST, UserError, visible
from microdit_jax.files import atomic_folder

LARGE = 1 << 28  # bytes from which a progress bar is shown


def convert_to_folder(
    kind: Kind[Any],
    path: Path,
    output: Path,
    *,
    given: Mapping[str, Any] | None = None,
    config: tuple[dict[str, Any], str] | None = None,
    weights: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model folder `output`; does nothing if it was made from the same file before.

    Args:
      path: the file, or a model's folder in the layout of its library.
      given: values of the kind's options.
      config: contents of a config, and what it was read from, instead of the model's own.
      weights: which, if the file holds several; see holdings.choose.
      notes: more for the folder's config.json.
    Raises:
      UserError: the file is no such model or damaged, or another model is in the way.
    """
    start = time.monotonic()
    source = find_input(path, kind)
    if config:
        source = source._replace(config=config[0], config_from=config[1])
    values = {name: (given or {}).get(name) for name in kind.options}
    options = {**values, "config": source.config}
    options |= {"weights": weights} if weights else {}
    if output.exists():
        _check_same(source, options, output)
        return _copy_tokenizer(kind, source, output)
    with ThreadPoolExecutor(1) as pool:
        found = read_tensors(source.files, kind.part, weights)
        selected = kind.select(found.tensors)
        found = StateDict(selected.tensors, found.notes + selected.notes)
        about = pool.submit(describe_source, source.files)  # while the tensors are checked
        model_config = kind.make_config(found.tensors, source.config, values)
        num_bytes = sum(tensor.nbytes for tensor in found.tensors.values())
        dtypes = sorted({str(tensor.dtype) for tensor in found.tensors.values()})
        say("input", f"{path}, {num_bytes / 1e9:.2f} GB, {', '.join(dtypes)}")
        for note in source.notes + found.notes:
            say("", note)
        say("config", kind.describe(model_config))
        if source.config_from:
            say("", f"read from {source.config_from}")
        elif kind.describe_origin is not None:
            stated = {name: value for name, value in values.items() if value is not None}
            say("", kind.describe_origin(model_config, stated))
        with bar("checking", num_bytes) as progress:
            params = kind.from_torch(found.tensors, model_config, progress=progress)
        if constant := constant_weights(found.tensors):
            names = ", ".join(constant[:8]) + (", ..." if len(constant) > 8 else "")
            say("warning", f"{len(constant)} weights have one value only: {names}; never trained?")
        say("writing", str(output))
        metadata = {
            "kind": kind.name,
            kind.name: dataclasses.asdict(model_config),
            "source": about.result(),
            "options": options,
        }
        save_model(output, params, metadata | dict(notes or {}))
    _copy_tokenizer(kind, source, output)
    say("parameters", f"{read_metadata(output)['parameters']:,}")
    say_time(start, num_bytes)


def _copy_tokenizer(kind: Kind[Any], source: Input, output: Path) -> None:
    """Copies a kind's tokenizer from beside the weights to <output>/tokenizer."""
    if not kind.tokenizer_files or (output / "tokenizer").exists():
        return
    beside = source.files[0].parent
    found = [beside / name for name in kind.tokenizer_files if (beside / name).is_file()]
    if not found:
        say("", f"no tokenizer in {beside}; to encode texts put its files into {output}/tokenizer")
        return
    with atomic_folder(output / "tokenizer") as partial:
        for file in found:
            shutil.copy(file, partial)


def _check_same(source: Input, options: dict[str, Any], output: Path) -> None:
    """Raises UserError unless the folder was made from these files with these options."""
    made_from = read_metadata(output)
    same = made_from.get("source", {}).get("sha256") == describe_source(source.files)["sha256"]
    if not same or made_from.get("options") != options:
        made = made_from.get("source", {}).get("file", "another file")
        raise UserError(
            f"expected {output} not to exist, found a {made_from['kind']} made from {made}, maybe "
            "with other options; choose another folder or remove it"
        )
    say("nothing to do", f"{output} is complete, from the same file")


def say(what: str, text: str) -> None:
    """Prints one line of the converter's report, whatever names of a file it holds."""
    print(f"{what:<14}{visible(text, LONGEST)}", flush=True)


def say_time(start: float, num_bytes: int) -> None:
    """Prints the report's last line: how long it took since `start`, of time.monotonic."""
    seconds = time.monotonic() - start
    say("done in", f"{seconds:.1f} s, {num_bytes / 1e6 / seconds:.0f} MB/s")


@contextlib.contextmanager
def bar(what: str, num_bytes: int) -> Iterator[Callable[[int], Any]]:
    """Shows a progress bar if there are many bytes; yields a function to call with each count."""
    with tqdm.tqdm(
        desc=what, total=num_bytes, unit="B", unit_scale=True, disable=num_bytes < LARGE
    ) as shown:
        yield shown.update
