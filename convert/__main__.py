"""Converts checkpoints: a PyTorch file into a model folder, and a model folder back into a file."""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import tqdm

from convert import dit
from convert.safetensors_file import read_safetensors, write_safetensors
from convert.state_dict import read_state_dict
from convert.torch_file import write_torch
from microdit_jax.checkpoint import load_model, read_metadata, save_model, sha256
from microdit_jax.errors import UserError, exit_on_user_error

BIG = 1 << 28  # bytes from which a progress bar is shown
NOTE = "microdit_jax"  # where a written file says what it was made from
EXAMPLE = """example:
  python -m convert --kind=dit --input=dit_4_channel_0.5B_synthetic_data.pt --output=models/dit
  python -m convert --kind=dit --to=torch --input=models/dit --output=dit.safetensors
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see python -m convert --help")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command's flags; an unknown or bad one is a UserError."""
    parser = _Parser(
        prog="python -m convert",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--kind", choices=("dit",), default="dit", help="what the checkpoint is (default: dit)")
    add("--input", required=True, type=Path, help=".pt, .bin or .safetensors; or a model folder")
    add("--output", required=True, type=Path, help="model folder; or .pt or .safetensors")
    add("--to", choices=("orbax", "torch"), default="orbax", help="direction (default: orbax)")
    add("--head_dim", type=int, help="width of an attention head, where the file cannot tell")
    add("--expert_capacity", type=float, help="experts per token (default: 2.0)")
    add("--config", type=Path, help="JSON of DiTConfig's fields, instead of reading the file's")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="type to write with --to=torch")
    flags = parser.parse_args(argv)
    away = ("head_dim", "expert_capacity", "config") if flags.to == "torch" else ("dtype",)
    for name in away:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} does not go with --to={flags.to}; leave it out")
    return flags


def to_orbax(flags: argparse.Namespace) -> None:
    """A PyTorch or safetensors file -> a model folder, unless that was done before."""
    start = time.monotonic()
    options = {
        "head_dim": flags.head_dim,
        "expert_capacity": flags.expert_capacity,
        "config": _read_config(flags.config) if flags.config else None,
    }
    with ThreadPoolExecutor(1) as pool:
        if flags.output.exists():
            made_from = read_metadata(flags.output)
            same = made_from.get("source", {}).get("sha256") == _source(flags.input)["sha256"]
            if same and made_from.get("options") == options:
                return _say("nothing to do", f"{flags.output} is complete, from the same file")
            raise UserError(
                f"expected {flags.output} not to exist, found a model made from "
                f"{made_from.get('source')} with {made_from.get('options')}; "
                "choose another --output or remove it"
            )
        found = read_state_dict(flags.input, "dit")
        source = pool.submit(_source, flags.input)  # while the tensors are read
        if options["config"]:
            config = dit.config_from_dict(options["config"])
        else:
            config = dit.infer_config(
                found.tensors,
                head_dim=flags.head_dim,
                expert_capacity=2.0 if flags.expert_capacity is None else flags.expert_capacity,
            )
        num_bytes = sum(tensor.nbytes for tensor in found.tensors.values())
        dtypes = sorted({str(tensor.dtype) for tensor in found.tensors.values()})
        _say("input", f"{flags.input}, {num_bytes / 1e9:.2f} GB, {', '.join(dtypes)}")
        for note in found.notes:
            _say("", note)
        _say("config", describe(config))
        with _bar("checking", num_bytes) as progress:
            params = dit.from_torch(found.tensors, config, progress=progress)
        _say("writing", str(flags.output))
        metadata = {
            "kind": flags.kind,
            flags.kind: dataclasses.asdict(config),
            "source": source.result(),
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
        if _read_note(flags.output) == note:
            return _say("nothing to do", f"{flags.output} is complete, from the same model")
        raise UserError(
            f"expected {flags.output} not to exist, found a file made from something else; "
            "choose another --output or remove it"
        )
    config = dit.config_from_dict(metadata[flags.kind])
    _say("input", f"{flags.input}, {metadata['parameters']:,} parameters")
    _say("config", describe(config))
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    params, _ = load_model(flags.input, sharding=host)
    tensors = dit.to_torch(params, config)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with _bar("writing", num_bytes) as progress:
        kinds = {"dtype": flags.dtype, "progress": progress}
        if flags.output.suffix == ".safetensors":
            write_safetensors(flags.output, tensors, {NOTE: note}, **kinds)
        else:
            write_torch(flags.output, tensors, notes={f"extra/{NOTE}": note.encode()}, **kinds)
    _say("output", str(flags.output))
    _say_time(start, num_bytes)


def describe(config: dit.DiTConfig) -> str:
    """A config in one line."""
    mixer = f"mixer {config.patch_mixer_depth} x {config.patch_mixer_dim}"
    return (
        f"{config.depth} blocks of width {config.dim}, heads of {config.head_dim}, "
        f"{mixer if config.use_patch_mixer else 'no mixer'}, {config.num_experts} experts, "
        f"latents {config.in_channels} x {config.input_size} x {config.input_size}, "
        f"pos_interp_scale {config.pos_interp_scale:g}, captions {config.caption_channels} wide"
    )


def _read_config(path: Path) -> dict:
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"expected JSON of a config at {path}, found {error}") from error
    return contents.get("dit", contents)  # a model folder's config.json serves too


def _source(path: Path) -> dict:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _read_note(path: Path) -> str | None:
    """What a file written by this command says it was made from."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[1].get(NOTE)
    with contextlib.suppress(zipfile.BadZipFile, KeyError, OSError):
        with zipfile.ZipFile(path) as archive:
            return archive.read(f"archive/extra/{NOTE}").decode()
    return None


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
