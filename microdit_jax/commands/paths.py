"""The one table of the paths that commands take, and on which stores each of them works.

A URL in any flag or key of a configuration that is not named here is refused before any work: there
is no flag that a URL slips through, to become a local folder named "gs:".
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from microdit_jax.checkpoints.fetch import local_model
from microdit_jax.errors import UserError, visible
from microdit_jax.files import output_file, output_folder
from microdit_jax.files.bucket import SCHEMES
from microdit_jax.files.urls import COPY_AFTERWARDS, COPY_FIRST, as_given, scheme_of

ANY_FSSPEC = ("gs", "s3", "memory", "https", "http", "file")


class Place(NamedTuple):
    """A flag or key that takes a path.

    Attributes:
      stores: schemes of the URLs that it takes beside local paths.
      output: True if the command writes there.
      local: "file" or "folder" where `local_places` puts a local path in a URL's place; "" where
        the command handles URLs itself.
      otherwise: the way out, for the error.
    """

    stores: tuple[str, ...] = ()
    output: bool = False
    local: str = ""
    otherwise: str = ""


_IN, _OUT = Place(), Place(output=True)
_READ, _WRITTEN = Place(SCHEMES), Place(SCHEMES, output=True)
_FETCHED = Place(SCHEMES, local="file")  # or a folder
_FILE, _FOLDER = Place(SCHEMES, True, "file"), Place(SCHEMES, True, "folder")
_WORKDIR = Place(
    ("gs",),
    output=True,
    otherwise="Orbax writes checkpoints to no other store: train on a disk, and copy the folder "
    "afterwards (aws s3 sync)",
)
_DATA = Place(ANY_FSSPEC)
# What a text may say is nobody's business, a URL included.
TEXTS = {
    *(
        "prompt",
        "negative_prompt",
        "coordinator_address",
        "ray_address",
        "job_token",
        "config.eval.prompts",
        "config.lora.targets",
    ),
    *("config.log.wandb",),
}
_MODEL_FLAGS = {"base": _IN, "weaker": _IN, "model": _READ, "vae": _IN, "text_encoder": _IN}
_CONFIG = {
    "config": _IN,
    "config.teacher": _IN,
    "config.init_from": _READ,
    "config.init_weights_from": _READ,
    "config.data.cache": _OUT,
    "config.data.datasets.folder": _DATA,
    "config.data.folder": _DATA,
    "config.data.heldout.folder": _DATA,
    "config.data.text_encoder": _IN,
    "config.data.vae": _IN,
    "config.eval.score_prompts": _IN,
    "config.eval.score_reference": _IN,
}
# Command -> its flags that take paths.
PLACES: dict[str, dict[str, Place]] = {
    "train_main": _CONFIG | {"workdir": _WORKDIR, "health_file": _OUT},
    "sample_main": _MODEL_FLAGS
    | {"image": _FETCHED, "mask": _FETCHED, "prompts": _FETCHED, "again": _FETCHED, "out": _FOLDER},
    "microdit_jax.evaluate": _MODEL_FLAGS
    | {"prompts": _FETCHED, "reference": _FETCHED, "inception": _FETCHED, "clip": _FETCHED}
    | {"geneval_prompts": _FETCHED, "geneval_results": _FETCHED, "out": _FOLDER},
    "microdit_jax.app": _MODEL_FLAGS,
    "convert": {
        "input": _FETCHED,
        "base": _IN,
        "config": _FETCHED,
        "card": _OUT,
        "output": _READ._replace(output=True),
    },
    "convert.parity": {"input": _FETCHED, "base": _IN, "reference": _IN, "activations": _FETCHED}
    | {"config": _FETCHED, "record": _FILE, "json": _FILE},
    "microdit_jax.assets.publish": {"input": _IN, "base": _IN, "images": _IN, "output": _OUT},
    "microdit_jax.prepare": {"input": _READ, "captions": _FETCHED, "model": _READ, "vae": _IN}
    | {"text_encoder": _IN, "cache": _OUT, "output": _WRITTEN},
    "microdit_jax.prepare.mds_index": {"input": _OUT},
    "microdit_jax.prepare.reformat": {"input": _DATA, "vae": _IN, "text_encoder": _IN}
    | {"cache": _OUT, "output": _WRITTEN},
    "microdit_jax.xla.aot": _CONFIG | {"report": _FILE, "dump": _FOLDER},
    "microdit_jax.xla.bench": {"input": _IN, "report": _FILE, "dump": _FOLDER},
    "microdit_jax.xla.plot": {"reports": _FETCHED, "out": _FILE},
    "microdit_jax.training.report": {"runs": _READ, "out": _WRITTEN},
}


def check_stores(command: str, values: Mapping[str, Any]) -> None:
    """Raises UserError for a URL where the command cannot use one.

    Args:
      command: a key of PLACES; of any other every URL is refused.
      values: of all its flags, configurations among them.
    """
    places = PLACES.get(command.removesuffix(".__main__"), {})
    for name, path in _texts(values):
        scheme = scheme_of(path)
        if not scheme or name in TEXTS or "." in name and name in values:
            continue  # keys that were given as flags are read where the configuration has them
        place = places.get(name, Place())
        if scheme not in place.stores:
            also = f" or a URL of {', '.join(place.stores)}" if place.stores else ""
            way_out = place.otherwise or (COPY_AFTERWARDS if place.output else COPY_FIRST)
            shown = visible(as_given(path))
            raise UserError(f"expected a local path{also} in --{name}, found {shown}; {way_out}")


@contextlib.contextmanager
def local_places(command: str, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Gives a local path for each URL in the flags of a command that does not handle it itself.

    Inputs are fetched; outputs are sent when they are there, and at the end.

    Args:
      values: of all its flags.
    Returns:
      The values that are others than before, by name.
    Raises:
      UserError: a bucket that cannot be read or written.
    """
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for name, place in PLACES.get(command.removesuffix(".__main__"), {}).items():
            given = values.get(name)
            paths = given if isinstance(given, list) else [given]
            if not place.local or not any(path and scheme_of(path) for path in paths):
                continue
            local = [_local(place, path, stack) for path in paths]
            found[name] = local if isinstance(given, list) else local[0]
        yield found


def _local(place: Place, path: Any, stack: contextlib.ExitStack) -> Any:
    kind = type(path) if isinstance(path, Path) else str
    if not scheme_of(path):
        return path
    if not place.output:
        return kind(local_model(path))
    if place.local == "file":
        return kind(stack.enter_context(output_file(path)))
    return kind(stack.enter_context(output_folder(path)).path)


def _texts(values: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the texts in nested values; items of a list, and stages of a chain, as one name."""
    stages = values.get("stages", ()) if prefix else ()
    for name, value in values.items():
        path = prefix if name in stages else f"{prefix}{name}."
        for item in value if isinstance(value, list | tuple | set) else (value,):
            if isinstance(item, Mapping | ConfigDict):
                yield from _texts(item, path)
            elif isinstance(item, str | os.PathLike):
                yield path[:-1], os.fspath(item)
