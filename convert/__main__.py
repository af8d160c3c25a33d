"""Converts checkpoints: a PyTorch file into a model folder, and a model folder back into a file."""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import tqdm

from convert.arguments import Parser
from convert.inputs import CONFIG, describe_source, find_input, read_note, read_tensors
from convert.kinds import KINDS, make_config
from convert.safetensors_file import write_safetensors
from convert.state_dict import StateDict
from convert.torch_file import write_torch
from microdit_jax.checkpoint import load_model, read_metadata, save_model, sha256
from microdit_jax.errors import UserError, exit_on_user_error

BIG = 1 << 28  # bytes from which a progress bar is shown
NOTE = "microdit_jax"  # where a written file says what it was made from
EXAMPLE = """example:
  python -m convert --kind=dit --input=dit_4_channel_0.5B_synthetic_data.pt --output=models/dit
  python -m convert --kind=vae --input=stable-diffusion-xl-base-1.0 --output=models/vae
  python -m convert --kind=clip_text --input=open_clip_pytorch_model.bin --output=models/clip
  python -m convert --kind=dit --to=torch --input=models/dit --output=dit.safetensors
"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command's flags; an unknown or bad one is a UserError."""
    parser = Parser(
        prog="python -m convert",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--kind", choices=tuple(KINDS), default="dit", help="what the model is (default: dit)")
    add("--input", required=True, type=Path, help=".pt, .bin, .safetensors, or a model's folder")
    add("--output", required=True, type=Path, help="model folder; or .pt, .bin or .safetensors")
    add("--to", choices=("orbax", "torch"), default="orbax", help="direction (default: orbax)")
    add("--head_dim", type=int, help="dit: width of an attention head, if the file cannot tell")
    add("--expert_capacity", type=float, help="dit: experts per token (default: 2.0)")
    add("--scaling_factor", type=float, help="vae: of its latents, if there is no config.json")
    add("--activation", help="clip_text: quick_gelu, gelu or gelu_tanh, if there is no config")
    add("--heads", type=int, help="clip_text: attention heads, if there is no config")
    add("--padding", type=int, help="clip_text: id after a text's end (default: its layout's)")
    add("--max_tokens", type=int, help="t5: to which texts are cut (default: 120)")
    add("--config", type=Path, help="JSON of the config, instead of reading the model's own")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="type to write with --to=torch")
    flags = parser.parse_args(argv)
    options = {name for kind in KINDS.values() for name in kind.options}
    for name in (options | {"config"}) if flags.to == "torch" else {"dtype"}:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} does not go with --to={flags.to}; leave it out")
    for name in options - set(KINDS[flags.kind].options):
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} does not go with --kind={flags.kind}; leave it out")
    return flags


def to_orbax(flags: argparse.Namespace) -> None:
    """A PyTorch or safetensors file -> a model folder, unless that was done before."""
    start = time.monotonic()
    kind, module = KINDS[flags.kind], KINDS[flags.kind].load()
    source = find_input(flags.input, kind)
    if flags.config:
        config = _read_config(flags.config, flags.kind)
        source = source._replace(config=config, config_from=str(flags.config))
    given = {name: getattr(flags, name) for name in kind.options}
    options = {**given, "config": source.config}
    with ThreadPoolExecutor(1) as pool:
        if flags.output.exists():
            made_from = read_metadata(flags.output)
            same = (
                made_from.get("source", {}).get("sha256") == describe_source(source.files)["sha256"]
            )
            if same and made_from.get("options") == options:
                return _say("nothing to do", f"{flags.output} is complete, from the same file")
            raise UserError(
                f"expected {flags.output} not to exist, found a model made from "
                f"{made_from.get('source')} with {made_from.get('options')}; "
                "choose another --output or remove it"
            )
        found = read_tensors(source.files, module.PART)
        if hasattr(module, "select"):
            selected = module.select(found.tensors)
            found = StateDict(selected.tensors, found.notes + selected.notes)
        about = pool.submit(describe_source, source.files)  # while the tensors are read
        config = make_config(kind, found.tensors, source.config, given)
        num_bytes = sum(tensor.nbytes for tensor in found.tensors.values())
        dtypes = sorted({str(tensor.dtype) for tensor in found.tensors.values()})
        _say("input", f"{flags.input}, {num_bytes / 1e9:.2f} GB, {', '.join(dtypes)}")
        for note in source.notes + found.notes:
            _say("", note)
        _say("config", _describe(module, config))
        if source.config_from:
            _say("", f"read from {source.config_from}")
        with _bar("checking", num_bytes) as progress:
            params = module.from_torch(found.tensors, config, progress=progress)
        _say("writing", str(flags.output))
        metadata = {
            "kind": flags.kind,
            flags.kind: dataclasses.asdict(config),
            "source": about.result(),
            "options": options,
        }
        save_model(flags.output, params, metadata)
    _say("parameters", f"{read_metadata(flags.output)['parameters']:,}")
    _say_time(start, num_bytes)


def to_torch(flags: argparse.Namespace) -> None:
    """A model folder -> a PyTorch or safetensors file, unless that was done before."""
    start = time.monotonic()
    if flags.output.suffix not in (".pt", ".bin", ".safetensors"):
        raise UserError(
            f"expected --output to end in .pt, .bin or .safetensors, found {flags.output}"
        )
    metadata = read_metadata(flags.input)
    if metadata["kind"] != flags.kind:
        raise UserError(
            f"expected a model of kind {flags.kind} in {flags.input}, found {metadata['kind']}; "
            f"give --kind={metadata['kind']}"
        )
    # The manifest has every file's checksum, so its own stands for the whole folder.
    note = json.dumps({"model": sha256(flags.input / "manifest.json"), "dtype": flags.dtype})
    if flags.output.exists():
        if read_note(flags.output, NOTE) == note:
            return _say("nothing to do", f"{flags.output} is complete, from the same model")
        raise UserError(
            f"expected {flags.output} not to exist, found a file made from something else; "
            "choose another --output or remove it"
        )
    module = KINDS[flags.kind].load()
    config = module.config_from_dict(metadata[flags.kind])
    _say("input", f"{flags.input}, {metadata['parameters']:,} parameters")
    _say("config", _describe(module, config))
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    params, _ = load_model(flags.input, sharding=host)
    tensors = module.to_torch(params, config)
    notes = {NOTE: note}
    if hasattr(module, "config_json"):
        notes[CONFIG] = json.dumps(module.config_json(config))
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with _bar("writing", num_bytes) as progress:
        kinds = {"dtype": flags.dtype, "progress": progress}
        if flags.output.suffix == ".safetensors":
            write_safetensors(flags.output, tensors, notes, **kinds)
        else:
            members = {f"extra/{name}": text.encode() for name, text in notes.items()}
            write_torch(flags.output, tensors, notes=members, **kinds)
    _say("output", str(flags.output))
    _say_time(start, num_bytes)


def _describe(module: ModuleType, config: Any) -> str:
    return module.describe(config) if hasattr(module, "describe") else str(config)


def _read_config(path: Path, kind: str) -> dict:
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"expected JSON of a config at {path}, found {error}") from error
    if not isinstance(contents, dict):
        raise UserError(f"expected a JSON object at {path}, found {type(contents).__name__}")
    return contents.get(kind, contents)  # a model folder's config.json serves too


def _say(what: str, text: str) -> None:
    print(f"{what:<14}{text}", flush=True)


def _say_time(start: float, num_bytes: int) -> None:
    seconds = time.monotonic() - start
    _say("done in", f"{seconds:.1f} s, {num_bytes / 1e6 / seconds:.0f} MB/s")


@contextlib.contextmanager
def _bar(what: str, num_bytes: int) -> Iterator[Callable[[int], Any]]:
    with tqdm.tqdm(
        desc=what, total=num_bytes, unit="B", unit_scale=True, disable=num_bytes < BIG
    ) as bar:
        yield bar.update


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` without the program's name."""
    with exit_on_user_error():
        flags = parse_arguments(sys.argv[1:] if argv is None else argv)
        jax.config.update("jax_platforms", "cpu")  # a file on its way to a file needs no device
        {"orbax": to_orbax, "torch": to_torch}[flags.to](flags)


if __name__ == "__main__":
    main()
