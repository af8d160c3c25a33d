"""Compares our network with the PyTorch reference on one checkpoint, sub-module by sub-module."""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("convert.parity")

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from convert.reference import reference_arguments, run_reference
from microdit_jax.commands.parser import Parser
from microdit_jax.commands.paths import local_places
from microdit_jax.convert import dit
from microdit_jax.convert.inputs import find_input, read_stated_config, read_tensors
from microdit_jax.convert.keymap import torch_name
from microdit_jax.convert.networks import is_ours, open_source
from microdit_jax.errors import LONGEST, UserError, visible
from microdit_jax.files import atomic_file, check_writable, read_npz
from microdit_jax.machine import memory
from microdit_jax.models.dit import DiT, DiTConfig
from microdit_jax.models.layers import sincos_pos_embed

CAPTION_TOKENS = 77
DTYPES = ("float32", "bfloat16")
SIZES = {"head_dim": int, "expert_capacity": float}  # which no shape tells
OFF = 1e-3  # an element further off than this, in units of the reference's std, counts as off
EXAMPLE = """example:
  python -m convert.parity --input=dit.pt --reference=micro_diffusion_checkout --json=parity.json

The reference runs in float32; ours in float32 and bfloat16. Per sub-module, from the same inputs at
the network's entrance: median |error| and max |error| in units of the reference's standard
deviation, relative L2 error, the share of elements off by more than 1e-3 standard deviations, and
the share of expert choices that differ. Near ties send tokens to other experts between two correct
programs, so the median tells more than the maximum.
"""


class Recording(NamedTuple):
    """Inputs (channels-first, as the reference has them) and what the reference made of them."""

    inputs: dict[str, np.ndarray]
    mask_ratio: float
    outputs: dict[str, np.ndarray]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command's flags; an unknown or bad one is a UserError."""
    parser = Parser("convert.parity", __doc__, EXAMPLE)
    add = parser.add_argument
    add("--input", required=True, type=Path, help=".pt, .safetensors, a model folder, or a run")
    add("--reference", type=Path, help="checkout that holds micro_diffusion/; needs torch")
    add("--activations", type=Path, help="a recorded .npz to compare with instead")
    add("--record", type=Path, help="write what the reference gave to this .npz")
    add("--json", type=Path, help="write the figures to this file")
    add("--latent_res", type=int, help="side of the latents, if not the checkpoint's own")
    add("--batch", type=int, help="images (default: 1)")
    add(
        "--seed", type=int, help="of the inputs (default: 0); near ties differ from one to the next"
    )
    add("--mask_ratio", type=float, help="share of tokens dropped (default: 0)")
    for name, kind in SIZES.items():
        add(f"--{name}", type=kind, help="as for python -m convert, where the file cannot tell")
    add("--weights", help="model, ema or KEY.PATH, of several that the input holds")
    add("--base", type=Path, help="model that a run's adapters belong to, if not the package's")
    add("--config", type=Path, help="JSON of the config, instead of reading the file's own")
    flags = parser.parse_args(argv)
    if (flags.reference is None) == (flags.activations is None):
        raise UserError(
            "expected either --reference=FOLDER (a checkout of the PyTorch reference) or "
            "--activations=FILE.npz (a recorded run); give one of them"
        )
    if flags.activations:
        for name in ("record", "latent_res", "batch", "seed", "mask_ratio"):
            if getattr(flags, name) is not None:
                raise UserError(f"--{name} does not go with --activations; leave it out")
    return flags


def load(flags: argparse.Namespace) -> tuple[DiTConfig, dict[str, np.ndarray]]:
    """Config and state dict of --input, a file, a model folder or a training run.

    Says on stderr where the config comes from: a wrong one makes the reference wrong as well.
    """
    path: Path = flags.input
    if is_ours(path):
        ours = open_source(path, "dit", flags.weights, flags.base)
        _say(ours.description)
        return ours.config, dit.to_torch(ours.load(), ours.config)
    source = find_input(path, dit.KIND)
    given, origin = source.config, f"read from {source.config_from}"
    if flags.config:
        given, origin = read_stated_config(flags.config, "dit"), f"read from {flags.config}"
    stated = {name: vars(flags)[name] for name in SIZES if vars(flags)[name] is not None}
    found = read_tensors(source.files, dit.KIND.part, flags.weights)
    config = dit.KIND.make_config(found.tensors, given, stated)
    if given is None:
        origin = dit.describe_origin(config, stated)
    for line in (*found.notes, f"{dit.describe(config)}; {origin}"):
        _say(line)
    return config, found.tensors


def _say(line: str) -> None:
    """Prints a line on stderr at once: the table is long in coming."""
    print(visible(line, LONGEST), file=sys.stderr, flush=True)


def at_resolution(
    config: DiTConfig, tensors: Mapping[str, np.ndarray], latent_res: int
) -> tuple[DiTConfig, dict[str, np.ndarray]]:
    """Adapts the weights to latents of another size, positions stretched to the same range."""
    memory.check_host(
        8 * config.dim * latent_res**2 // config.patch_size**2,  # positions, in float64
        what=f"a network for --latent_res={latent_res}",
        fix="ask for smaller latents",
    )
    scale = config.pos_interp_scale * latent_res / config.input_size
    config = dataclasses.replace(config, input_size=latent_res, pos_interp_scale=scale)
    pos_embed = sincos_pos_embed(config.dim, config.grid, scale)[None]
    return config, {**tensors, "pos_embed": pos_embed}


def sample_inputs(config: DiTConfig, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Samples inputs like those of the sampler: unit latents and captions, log-normal noise."""
    values = config.in_channels * config.input_size**2 + CAPTION_TOKENS * config.caption_channels
    memory.check_host(
        8 * batch * values,  # float64 as they are made
        what=f"inputs of --batch={batch} images",
        fix="compare fewer",
    )
    rng = np.random.default_rng(seed)
    side, channels = config.input_size, config.in_channels
    shapes = {
        "x": (batch, channels, side, side),
        "t": (batch,),
        "y": (batch, 1, CAPTION_TOKENS, config.caption_channels),
    }
    inputs = {k: rng.standard_normal(shape, np.float32) for k, shape in shapes.items()}
    inputs["t"] = (1.2 * inputs["t"] - 0.6) / 4  # c_noise = ln(sigma) / 4
    inputs["mask_noise"] = rng.random((batch, config.num_tokens), np.float32)
    return inputs


def run_ours(
    config: DiTConfig,
    params: Any,
    inputs: Mapping[str, np.ndarray],
    mask_ratio: float,
    dtype: str,
) -> dict[str, np.ndarray]:
    """One forward pass of ours; the same names and layouts as run_reference's."""
    model = DiT(dataclasses.replace(config, dtype=dtype))
    noise = jnp.asarray(inputs["mask_noise"]) if mask_ratio else None

    @jax.jit
    def forward(params, x, t, y):
        (sample, _), state = model.apply(
            {"params": params},
            x,
            t,
            y,
            mask_noise=noise,
            mask_ratio=mask_ratio,
            capture_intermediates=lambda child, method: (
                method == "__call__" and len(child.path) == 1
            ),
            mutable=["intermediates"],
        )
        return sample, state["intermediates"]

    x, t, y = (jnp.asarray(inputs[name]) for name in ("x", "t", "y"))
    # float32 in earnest: accelerators multiply in fewer bits by default.
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        sample, intermediates = forward(params, x.transpose(0, 2, 3, 1), t, y[:, 0])
    outputs = {"sample": np.asarray(sample).transpose(0, 3, 1, 2)}
    for path, found in intermediates.items():
        name = torch_name(path)
        if "__call__" in found and not name.startswith("patch_mixer_map"):
            outputs[f"activation/{name}"] = np.asarray(found["__call__"][0], np.float32)
        if "mlp" in found:
            outputs[f"routing/{name}"] = np.asarray(found["mlp"]["routing"][0])
    return outputs


def compare(
    ours: Float[np.ndarray, "..."], reference: Float[np.ndarray, "..."]
) -> dict[str, float]:
    """Errors of one array, in units of the reference's standard deviation (see EXAMPLE)."""
    reference = np.asarray(reference, np.float64).reshape(ours.shape)
    error, std = np.abs(ours - reference), reference.std() or 1.0
    return {
        "median": float(np.median(error) / std),
        "relative_l2": float(np.linalg.norm(error) / (np.linalg.norm(reference) or 1.0)),
        "max": float(error.max() / std),
        "share_off": float(np.mean(error > OFF * std)),
    }


def routing_difference(
    ours: Int[np.ndarray, "... k"], reference: Int[np.ndarray, "... k"]
) -> float:
    """The share of slots (n, e, k) holding a token that the same expert of the reference left."""
    pairs = zip(
        ours.reshape(-1, ours.shape[-1]), reference.reshape(-1, ours.shape[-1]), strict=True
    )
    return float(np.mean([~np.isin(a, b) for a, b in pairs]))


def rows(ours: Mapping[str, Mapping], reference: Mapping[str, np.ndarray]) -> list[dict]:
    """The table: one row per sub-module in the order of the network, then the sample.

    Args:
      ours: compute type -> outputs.
    """
    names = [key for key in reference if key.startswith("activation/")] + ["sample"]
    missing = [n for n in names if any(n not in outputs for outputs in ours.values())]
    if missing:
        raise UserError(
            f"expected a recording of this network, found {', '.join(missing)} that it does not "
            "have; record one with --record"
        )
    table = []
    for key in names:
        row = {"module": key.removeprefix("activation/"), "shape": list(reference[key].shape)}
        for dtype, outputs in ours.items():
            row[dtype] = compare(outputs[key], reference[key])
            routing = f"routing/{row['module']}"
            if routing in reference:
                differ = routing_difference(outputs[routing], reference[routing])
                row[dtype]["routing_differs"] = differ
        table.append(row)
    return table


def print_table(table: Sequence[Mapping]) -> None:
    """The rows as text, errors of both compute types side by side."""
    columns = {
        "median": "median",
        "relative_l2": "rel. L2",
        "max": "max",
        "share_off": "% off",
        "routing_differs": "% routed",
    }
    print(f"{'':22}" + "".join(f"{dtype:^48}" for dtype in DTYPES))
    titles = "".join(f"{title:>9}" for title in columns.values())
    print(f"{'':22}{titles}   {titles}")
    for row in table:
        cells = []
        for dtype in DTYPES:
            for key in columns:
                value = row[dtype].get(key)
                percent = key in ("share_off", "routing_differs")
                text = "-" if value is None else f"{100 * value:.3f}" if percent else f"{value:.1e}"
                cells.append(f"{text:>9}")
            cells.append("   ")
        print(f"{row['module']:22}" + "".join(cells))


def read_recording(path: Path, config: DiTConfig) -> Recording:
    """A recorded run: x, t, y (channels-first), activation/NAME, sample, perhaps routing/NAME."""
    try:
        arrays = read_npz(path)
        mask_ratio = float(arrays.get("mask_ratio", 0.0))
    except (OSError, ValueError) as error:
        raise UserError(f"expected a recorded .npz at {path}, found {error}") from error
    keys = ("activation/", "routing/")
    inputs = {k: arrays[k] for k in ("x", "t", "y", "mask_noise") if k in arrays}
    outputs = {k: arrays[k] for k in arrays if k.startswith(keys) or k == "sample"}
    shape = (config.in_channels, config.input_size, config.input_size)
    if {"x", "t", "y"} - set(inputs) or "sample" not in outputs or inputs["x"].shape[1:] != shape:
        found = inputs["x"].shape[1:] if "x" in inputs else f"only {', '.join(inputs) or 'others'}"
        raise UserError(
            f"expected x (n, {', '.join(map(str, shape))}), t, y and sample in {path}, found "
            f"{found}; record one for this checkpoint with --record"
        )
    return Recording(inputs, mask_ratio, outputs)


def main(arguments: Sequence[str]) -> None:
    """The command; `arguments` without the program's name."""
    flags = parse_arguments(arguments)
    for path in filter(None, (flags.record, flags.json)):
        check_writable(path)
    with local_places("convert.parity", vars(flags)) as local:
        vars(flags).update(local)
        run(flags)


def run(flags: argparse.Namespace) -> None:
    """Runs both networks, and prints and writes the table of their differences."""
    config, tensors = load(flags)
    if flags.latent_res:
        config, tensors = at_resolution(config, tensors, flags.latent_res)
    params = dit.from_torch(tensors, config)  # before the reference runs: it names bad input
    seconds = {}
    start = time.monotonic()
    if flags.activations:
        recording = read_recording(flags.activations, config)
    else:
        inputs = sample_inputs(config, flags.batch or 1, flags.seed or 0)
        mask_ratio = flags.mask_ratio or 0.0
        _say(f"running the reference from {flags.reference}, in float32")
        outputs = run_reference(flags.reference, config, tensors, inputs, mask_ratio)
        recording = Recording(inputs, mask_ratio, outputs)
        seconds["reference"] = time.monotonic() - start
    if flags.record:
        with atomic_file(flags.record) as file:
            arguments = json.dumps(reference_arguments(config))
            extra = {"config": arguments, "mask_ratio": recording.mask_ratio}
            np.savez(file, **recording.inputs, **recording.outputs, **extra)
    params = jax.tree.map(jnp.asarray, params)
    ours = {}
    for dtype in DTYPES:
        start = time.monotonic()
        _say(f"running ours in {dtype}")
        ours[dtype] = run_ours(config, params, recording.inputs, recording.mask_ratio, dtype)
        seconds[dtype] = time.monotonic() - start
    table = rows(ours, recording.outputs)
    print_table(table)
    print(", ".join(f"{what} {spent:.1f} s" for what, spent in seconds.items()))
    if flags.json:
        report = {
            "input": flags.input.name,
            "against": (flags.activations or flags.reference).name,
            "device": jax.devices()[0].device_kind,
            "mask_ratio": recording.mask_ratio,
            "seed": flags.seed or 0,
            "seconds": seconds,
            "config": dataclasses.asdict(config),
            "rows": table,
        }
        with atomic_file(flags.json) as file:
            file.write(json.dumps(report, indent=1).encode() + b"\n")
