"""Writes weights of ours to a file for PyTorch: a whole network, or a run's adapters alone."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from microdit_jax.checkpoints.run import is_run, read_run_metadata
from microdit_jax.checkpoints.weights import load_adapters
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.convert.inputs import CONFIG, NOTE, read_note
from microdit_jax.convert.kinds import get_kind
from microdit_jax.convert.networks import abstract_params, adapted_network, open_source
from microdit_jax.convert.to_folder import bar, say, say_time
from microdit_jax.errors import UserError, visible
from microdit_jax.trees import flatten


def write_weights(
    path: Path,
    output: Path,
    kind_name: str = "dit",
    *,
    weights: str | None = None,
    base: Path | None = None,
    dtype: str | None = None,
) -> None:
    """Writes a model of ours to a file, unless that was done before.

    Args:
      path, weights, base: as networks.open_source takes them.
      output: ends in .pt, .bin or .safetensors.
      dtype: to write; None keeps each weight's own.
    Raises:
      UserError: no such model, or another file is in the way.
    """
    start = time.monotonic()
    if output.suffix not in (".pt", ".bin", ".safetensors"):
        raise UserError(f"expected --output to end in .pt, .bin or .safetensors, found {output}")
    kind = get_kind(kind_name)
    source = open_source(path, kind.name, weights, base)
    config = source.config
    made_from = {**source.made_from, "dtype": dtype}
    note = json.dumps({**made_from, "kind": kind.name, "config": dataclasses.asdict(config)})
    if output.exists():
        if read_note(output, NOTE) == note:
            return say("nothing to do", f"{output} is complete, from the same model")
        raise UserError(
            f"expected {output} not to exist, found a file made from something else; "
            "choose another --output or remove it"
        )
    say("input", source.description)
    say("config", kind.describe(config))
    params = source.load()
    tensors = kind.to_torch(params, config)
    notes = {NOTE: note}
    if kind.config_json is not None:
        notes[CONFIG] = json.dumps(kind.config_json(config))
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with bar("writing", num_bytes) as progress:
        if output.suffix == ".safetensors":
            write_safetensors(output, tensors, notes, dtype=dtype, progress=progress)
        else:
            members = {f"extra/{name}": text.encode() for name, text in notes.items()}
            write_torch(output, tensors, notes=members, dtype=dtype, progress=progress)
    say("output", str(output))
    say_time(start, num_bytes)


def write_adapters(
    run: Path, output: Path, *, weights: str | None = None, dtype: str | None = None
) -> None:
    """Writes a run's adapters alone as a .safetensors file, in the names that PEFT uses.

    Args:
      weights: "model" for the trained ones; None takes their average where the run keeps one.
    Raises:
      UserError: no run that trained adapters, or a file is in the way.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"expected --output to end in .safetensors, found {output}")
    adapted = adapted_network(run) if is_run(run) else None
    if adapted is None:
        raise UserError(
            f"expected a run that trained adapters (config.lora.rank), found none at "
            f"{visible(run)}; python -m convert --to=torch writes a whole network"
        )
    if output.exists():
        raise UserError(f"expected {output} not to exist; choose another --output")
    about = read_run_metadata(run, "has_ema", "dit")
    config = get_kind("dit").config_from_dict(about["dit"])
    ema = about["has_ema"] and weights != "model"
    adapters, _ = load_adapters(run, adapted, abstract_params(config), ema=ema)
    tensors = {}
    for path, array in flatten(adapters).items():
        module, _, name = path.rpartition("/")
        name = {"a": "lora_A", "b": "lora_B"}[name]
        module = module.removesuffix("/kernel").replace("/", ".")
        tensors[f"{module}.{name}.weight"] = np.asarray(array).T
    lora = adapted.lora
    notes = {
        "rank": f"{lora.rank}", "alpha": f"{lora.alpha:g}", "base": adapted.base,
        "base_sha256": adapted.weights,
    }  # fmt: skip
    write_safetensors(output, tensors, notes, dtype=dtype)
    say("adapters", f"{sum(t.size for t in tensors.values()):,} weights of rank {lora.rank}")
    say("output", f"{output}, {output.stat().st_size / 1e6:.1f} MB")
