"""Converts the image autoencoder between diffusers' AutoencoderKL and our parameters."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from microdit_jax.convert.arguments import (
    OTHER_KIND,
    config_from_fields,
    is_number,
    open_folder,
    refuse_other_config,
)
from microdit_jax.convert.config_keys import Keys
from microdit_jax.convert.keymap import (
    CONV,
    LINEAR,
    SAME,
    Entry,
    Params,
    Rule,
    abstract_params,
    build_table,
    to_params,
)
from microdit_jax.convert.keymap import to_tensors as table_to_tensors
from microdit_jax.convert.kinds import Kind
from microdit_jax.encoders.vae import AutoencoderKL, VaeConfig
from microdit_jax.encoders.vae_codec import VaeCodec
from microdit_jax.errors import UserError, visible

RULES = [
    Rule(r"(.*/to_(?:q|k|v|out_0))/kernel", r"\1.weight", LINEAR),
    Rule(r"(.*)/kernel", r"\1.weight", CONV),
    Rule(r"(.*)/scale", r"\1.weight", SAME),
    Rule(r"(.*)/bias", r"\1.bias", SAME),
]
# The attention's layers as diffusers named them before version 0.15.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(rf"(.*\.attentions\.\d+)\.({'|'.join(OLD_NAMES)})\.(weight|bias)")
LINEAR_NAME = re.compile(r".*\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight")

BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
CONSTANTS = ("shift_factor", "latents_mean", "latents_std")
# What a config.json may state, by AutoencoderKL of diffusers 0.42.
KEYS = Keys(
    "config.json",
    "VAE",
    used=(
        *("in_channels", "out_channels", "block_out_channels", "layers_per_block"),
        *("latent_channels", "norm_num_groups", "scaling_factor", "use_quant_conv"),
        *("use_post_quant_conv", "dtype", *CONSTANTS, *BLOCKS),
    ),
    without_effect=("_diffusers_version", "_name_or_path", "force_upcast", "sample_size"),
    only={
        "_class_name": (None, "AutoencoderKL"),
        "act_fn": (None, "silu"),
        "mid_block_add_attention": (None, True),
    },
)
FIELDS = tuple(field.name for field in dataclasses.fields(VaeConfig))


def infer_config(
    state_dict: Mapping[str, Any],
    config_json: Mapping[str, Any] | None = None,
    *,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
) -> VaeConfig:
    """Returns the config of the autoencoder whose state dict this is.

    Sizes come from the tensors' shapes, and must be those that config.json names; norm_num_groups
    and the constants of the latents come from config.json.

    Args:
      state_dict: names as diffusers has them, old or new.
      config_json: contents of the model's config.json. Without it there are 32 groups, as
        diffusers has it.
      scaling_factor: for a config.json without one; it is never guessed.
      shift_factor: instead of config.json's; 0 makes latents as the reference does, which
        multiplies by scaling_factor alone.
    Raises:
      UserError: not an AutoencoderKL, no scaling_factor, or a config.json of another network.
    """
    sizes = _sizes(state_dict)
    given = dict(config_json or {})
    _check_config(given, sizes)
    found = given.get("scaling_factor")
    factor = scaling_factor if found is None else found
    if factor is None:
        raise UserError(
            "expected the VAE's scaling_factor in a config.json beside its weights, found none; "
            "add that file, or convert it first: python -m convert --kind=vae "
            "--scaling_factor=0.13025 (SDXL's; the weights do not tell)"
        )
    if None not in (found, scaling_factor) and found != scaling_factor:
        raise UserError(
            f"config.json has scaling_factor {found}, found {scaling_factor} asked for; leave it "
            "out, or correct the config.json"
        )
    fields = {
        **sizes,
        "norm_num_groups": given.get("norm_num_groups", 32),
        "scaling_factor": float(factor),
        **_constants(given, shift_factor),
        "dtype": given.get("dtype", "float32"),  # only in a model folder's config, which is ours
    }
    return config_from_fields(VaeConfig, fields)


def _constants(given: Mapping[str, Any], shift_factor: float | None) -> dict[str, Any]:
    """Reads what is subtracted from latents, and divided by, before scaling_factor."""
    found = {name: given[name] for name in CONSTANTS if given.get(name) is not None}
    if shift_factor is not None:
        found["shift_factor"] = shift_factor
    for name, value in found.items():
        wanted = "a number" if name == "shift_factor" else "numbers, one for each latent channel"
        values = [value] if name == "shift_factor" else value
        if not isinstance(values, list | tuple) or not all(map(is_number, values)):
            KEYS.refuse(name, value, f"as {wanted}")
    return found


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    config: VaeConfig,
    *,
    check_finite: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Params:
    """Converts diffusers' state dict to parameters of `AutoencoderKL(config)`.

    Strict: every tensor is used exactly once, in the shape the config asks for. The attention's
    layers may have their old names (query, key, value, proj_attn), and be 1x1 convolutions.

    Args:
      check_finite: refuse, and name, tensors with NaN or infinite values.
      progress: called with the number of bytes just checked.
    Returns:
      A nested dict of float32 numpy arrays; transposed views of the given ones where those are
      float32.
    Raises:
      UserError: tensors missing, unexpected, given twice, misshapen (all listed) or not finite.
    """
    return to_params(
        _modern(state_dict), rename_table(config), check_finite=check_finite, progress=progress
    )


def to_torch(params: Params, config: VaeConfig) -> dict[str, np.ndarray]:
    """Converts parameters to a state dict that diffusers loads, in its new names.

    Raises:
      UserError: parameters missing, unexpected or misshapen; all are listed.
    """
    return table_to_tensors(params, rename_table(config))


def config_from_dict(fields: Mapping[str, Any]) -> VaeConfig:
    """Returns a VaeConfig from the fields of a model folder's config.json.

    Raises:
      UserError: fields that VaeConfig does not have, or too few.
    """
    return config_from_fields(VaeConfig, fields)


def config_json(config: VaeConfig) -> dict[str, Any]:
    """Returns the config.json that diffusers' AutoencoderKL.from_pretrained reads."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **{name: getattr(config, name) for name in FIELDS if name != "dtype"},
        "block_out_channels": list(config.block_out_channels),
        "shift_factor": config.shift_factor or None,
        "latents_mean": config.latents_mean and list(config.latents_mean),
        "latents_std": config.latents_std and list(config.latents_std),
    }


def describe(config: VaeConfig) -> str:
    """Describes a config in one line."""
    return (
        f"widths {', '.join(map(str, config.block_out_channels))}, {config.layers_per_block} "
        f"resnets a level, {config.norm_num_groups} groups, {config.latent_channels} latent "
        f"channels at 1/{config.factor} of the sides, scaling_factor {config.scaling_factor:g}"
        + (f", shift_factor {config.shift_factor:g}" if config.shift_factor else "")
        + (", latents_mean and latents_std" if config.latents_mean is not None else "")
    )


@functools.lru_cache(maxsize=32)
def rename_table(config: VaeConfig) -> Sequence[Entry]:
    """Every parameter of the network with its torch name, both shapes and the transform."""
    side = config.factor
    images = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    return tuple(build_table(RULES, abstract_params(AutoencoderKL(config), images)))


def load_codec(
    folder: str | Path,
    name: str | None = None,
    *,
    dtype: str | None = None,
    slice_size: int = 1,
    sharding: Any = None,
) -> VaeCodec:
    """Returns the codec of a model folder made by `python -m convert --kind=vae`.

    Args:
      name: what data and models carry to find it again; by default the weights' checksum.
      dtype: type of the computation, "float32" or "bfloat16"; None keeps the model's own.
      slice_size: images in one call of the network.
      sharding: where the parameters go, as for microdit_jax.checkpoints.model_folder.load_model.
    Raises:
      UserError: not a model folder of this kind, or damaged.
    """
    found = open_folder(folder, KIND.name, sharding=sharding)
    config = config_from_dict(found.config)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    return VaeCodec(name or found.name, config, found.params, slice_size)


def _modern(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames tensors to diffusers' new names; attention's 1x1 convolutions become matrices."""
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in state_dict.items():
        if match := OLD_NAME.fullmatch(name):
            name = f"{match[1]}.{OLD_NAMES[match[2]]}.{match[3]}"
        if name in tensors:
            raise UserError(
                f"expected every tensor once, found {name} under its old and its new name; remove "
                "one of them"
            )
        if LINEAR_NAME.fullmatch(name) and tuple(tensor.shape[2:]) == (1, 1):
            tensor = tensor.reshape(tensor.shape[:2])
        tensors[name] = tensor
    return tensors


def _sizes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Reads VaeConfig's sizes off the tensors' shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if "encoder.down.0.block.0.conv1.weight" in shapes:
        raise UserError(
            "expected a VAE in diffusers' layout, found the original latent diffusion names "
            "(encoder.down.0.block.0...); take diffusion_pytorch_model.safetensors instead"
        )
    convs = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    missing = [name for name in convs if len(shapes.get(name, ())) != 4]
    levels, layers = 0, 0
    while f"encoder.down_blocks.{levels}.resnets.0.conv1.weight" in shapes:
        levels += 1
    while f"encoder.down_blocks.0.resnets.{layers}.conv1.weight" in shapes:
        layers += 1
    if missing or not levels:
        found = ", ".join(list(shapes)[:5]) or "no tensor"
        raise UserError(
            "expected the state dict of a diffusers AutoencoderKL, found none of "
            f"{', '.join(missing) or 'encoder.down_blocks'} among {len(shapes)} tensors ({found}, "
            f"...); {OTHER_KIND}"
        )
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    return {
        "block_out_channels": tuple(widths),
        "latent_channels": shapes[convs[1]][1],
        "in_channels": shapes[convs[0]][1],
        "out_channels": shapes[convs[2]][0],
        "layers_per_block": layers,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _check_config(given: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raises UserError for a config.json of another network than this, or than the tensors'."""
    KEYS.check({name: value for name, value in given.items() if value is not None})
    for name, only in BLOCKS.items():
        value = given.get(name) or []
        if not isinstance(value, list | tuple) or any(block != only for block in value):
            KEYS.refuse(name, value, f"of {only} alone")
    faults = []
    for name, size in sizes.items():
        value = given.get(name)
        found = tuple(value) if isinstance(value, list) else value
        if value is not None and (
            found != size or isinstance(found, bool) != isinstance(size, bool)
        ):
            faults.append(f"{name} {visible(value, 60)} (the tensors have {size})")
    refuse_other_config(faults)
    if (value := given.get("scaling_factor")) is not None and not is_number(value):
        KEYS.refuse("scaling_factor", repr(value), "as a number")


KIND = Kind(
    name="vae",
    part="vae",
    infer_config=infer_config,
    from_torch=from_torch,
    to_torch=to_torch,
    config_from_dict=config_from_dict,
    describe=describe,
    config_json=config_json,
    options=("scaling_factor", "shift_factor"),
    config_keys=("latent_channels", "scaling_factor"),
    stems=("diffusion_pytorch_model",),
    subfolders=("vae",),
)
