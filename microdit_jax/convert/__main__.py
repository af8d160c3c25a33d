"""Converts checkpoints: a PyTorch file into a model folder, and a model folder back into a file."""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.convert.__main__")

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from microdit_jax.commands.parser import Parser
from microdit_jax.commands.paths import local_places
from microdit_jax.convert.inputs import read_stated_config
from microdit_jax.convert.kinds import NAMES, get_kind
from microdit_jax.convert.model_card import describe_model, model_card
from microdit_jax.convert.networks import is_ours
from microdit_jax.convert.to_file import write_adapters, write_weights
from microdit_jax.convert.to_folder import convert_to_folder, say
from microdit_jax.errors import UserError, visible
from microdit_jax.files import check_writable, output_file, output_folder, write_text
from microdit_jax.files.urls import scheme_of

EXAMPLE = """example:
  python -m convert --kind=dit --input=dit_4_channel_0.5B_synthetic_data.pt --output=models/dit
  python -m convert --kind=vae --input=stable-diffusion-xl-base-1.0 --output=models/vae
  python -m convert --kind=clip_text --input=DFN5B-CLIP-ViT-H-14-378 --output=models/clip_text
  python -m convert --kind=dit --to=torch --input=models/dit --output=dit.safetensors
  python -m convert --to=torch --input=runs/s4 --weights=ema --output=dit.pt --card=README.md
"""
# Flags of some kinds alone, which go to their infer_config.
OPTIONS: dict[str, dict[str, Any]] = {
    "head_dim": {"type": int, "help": "dit: width of an attention head, if the file cannot tell"},
    "expert_capacity": {"type": float, "help": "dit: experts per token, if the file cannot tell"},
    "scaling_factor": {"type": float, "help": "vae: of its latents, if there is no config.json"},
    "shift_factor": {"type": float, "help": "vae: instead of config.json's; 0: the reference's"},
    "activation": {"help": "clip_text: quick_gelu, gelu or gelu_tanh, if there is no config"},
    "heads": {"type": int, "help": "clip_text: attention heads, if there is no config"},
    "padding": {"type": int, "help": "clip_text: id after a text's end (default: its layout's)"},
    "max_tokens": {"type": int, "help": "t5, bert: to which texts are cut (default: 120, 64)"},
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags; raises UserError for an unknown or bad one."""
    parser = Parser("convert", __doc__, EXAMPLE)
    add = parser.add_argument
    add("--kind", choices=NAMES, default="dit", help="what the model is (default: dit)")
    add(
        "--input", required=True, type=Path, help=".pt, .bin, .safetensors, a model's folder; a run"
    )
    add("--output", required=True, type=Path, help="model folder; or .pt, .bin or .safetensors")
    add("--to", choices=("orbax", "torch", "lora"), default="orbax", help="a model folder "
        "(default); a file for PyTorch; the adapters alone of a run that trained some")  # fmt: skip
    add("--base", type=Path, help="model that a run's adapters belong to, if not the package's")
    for name, settings in OPTIONS.items():
        add(f"--{name}", **settings)
    add("--config", type=Path, help="JSON of the config, instead of reading the model's own")
    add("--weights", help="model, ema or KEY.PATH, of several that the input holds")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="type to write with --to=torch")
    add("--card", type=Path, help="a model card to write as well, in Markdown; of --kind=dit alone")
    flags = parser.parse_args(argv)
    if flags.card and flags.kind != "dit":
        raise UserError(f"--card does not go with --kind={flags.kind}; leave it out")
    given = {name for name, value in vars(flags).items() if value is not None}
    unused = {"dtype", "base"} if flags.to == "orbax" else {"config", *OPTIONS}
    unused |= {"base"} if flags.to == "lora" else set()
    for name in sorted(given & unused):
        raise UserError(f"--{name} does not go with --to={flags.to}; leave it out")
    for name in sorted((given & OPTIONS.keys()) - set(get_kind(flags.kind).options)):
        raise UserError(f"--{name} does not go with --kind={flags.kind}; leave it out")
    return flags


def to_orbax(flags: argparse.Namespace) -> None:
    """Converts a PyTorch or safetensors file to a model folder, unless that was done before.

    Raises:
      UserError: the input is ours. A model folder would lose a run's towers and noise levels.
    """
    if is_ours(flags.input):
        raise UserError(
            f"expected a file or folder of PyTorch's at {visible(flags.input)}, found a model of "
            "ours, which every command takes as it is (sample_main.py --model=...); "
            "give python -m convert --to=torch for a file of its weights"
        )
    kind = get_kind(flags.kind)
    config = (
        (read_stated_config(flags.config, flags.kind), str(flags.config)) if flags.config else None
    )
    given = {name: vars(flags)[name] for name in kind.options}
    convert_to_folder(
        kind, flags.input, flags.output, given=given, config=config, weights=flags.weights
    )


def to_torch(flags: argparse.Namespace) -> None:
    """Converts a model folder, or a run's network, to a file, unless that was done before."""
    write_weights(
        flags.input, flags.output, flags.kind, weights=flags.weights, base=flags.base,
        dtype=flags.dtype,
    )  # fmt: skip


def to_lora(flags: argparse.Namespace) -> None:
    """Writes a run's adapters alone."""
    write_adapters(flags.input, flags.output, weights=flags.weights, dtype=flags.dtype)


def write_card(flags: argparse.Namespace) -> None:
    """Writes the model card of what was converted, unless there is one."""
    if flags.card.exists():
        return say("nothing to do", f"{flags.card} is there, and stays as it is")
    about = describe_model(flags.output if flags.to == "orbax" else flags.input, flags.weights)
    write_text(flags.card, model_card(about, flags.output.name, adapters=flags.to == "lora"))
    say("card", str(flags.card))


def main(arguments: Sequence[str]) -> None:
    """The command; `arguments` without the program's name."""
    flags = parse_arguments(arguments)
    check_writable(flags.output, folder=flags.to == "orbax")
    if flags.card:
        check_writable(flags.card)
    jax.config.update("jax_platforms", "cpu")  # a file on its way to a file needs no device
    work = {"orbax": to_orbax, "torch": to_torch, "lora": to_lora}[flags.to]
    with local_places("convert", vars(flags)) as local, contextlib.ExitStack() as stack:
        vars(flags).update(local)
        if scheme_of(flags.output) and flags.to != "orbax":
            flags.output = stack.enter_context(output_file(flags.output))
        elif scheme_of(flags.output):
            flags.output = stack.enter_context(output_folder(flags.output)).path
            with contextlib.suppress(OSError):
                flags.output.rmdir()  # empty: a model's folder is made whole, in its place
        work(flags)
        if flags.card:
            write_card(flags)
