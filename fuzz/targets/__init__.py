"""Targets: each takes bytes and reads them as one of the package's readers would."""

import dataclasses
import importlib
from collections.abc import Callable

from fuzz.grammar import Mutate
from fuzz.scratch import Scratch

Read = Callable[[bytes], object]


@dataclasses.dataclass(frozen=True)
class Target:
    """One reader under test.

    Attributes:
      open: makes the function that reads; given the folder for its files.
      refusals: exceptions that the reader documents.
      words: what its format is made of, for the mutations.
      grammar: a mutation that keeps the format; None: bytes alone are changed.
      max_bytes: of one input.
    """

    open: Callable[[Scratch], Read]
    refusals: tuple[type[Exception], ...]
    words: tuple[bytes, ...] = ()
    grammar: Mutate | None = None
    max_bytes: int = 4096


# Name on the command line and of the corpus's folder -> module of its target
MODULES = {
    "pt": "checkpoint_files",
    "legacy_pt": "checkpoint_files",
    "safetensors": "checkpoint_files",
    "distributed": "checkpoint_files",
    "mds_index": "datasets",
    "mds_shard": "datasets",
    "tar": "archives",
    "zip": "archives",
    "table": "archives",
    "columns": "columns",
    "model_config": "folders",
    "run_config": "folders",
    "manifest": "folders",
    "tfds_features": "folders",
    "metrics": "folders",
    "png_settings": "images",
    "npz": "scores",
    "prompts": "scores",
    "codec": "scores",
    "preflight": "messages",
    "page_request": "messages",
}


def target(name: str) -> Target:
    """Returns a target by its name, importing what its reader needs."""
    return importlib.import_module(f"fuzz.targets.{MODULES[name]}").TARGETS[name]
