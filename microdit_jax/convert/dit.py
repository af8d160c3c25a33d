"""Converts MicroDiT between the reference's state dict and our parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from microdit_jax.convert.arguments import config_from_fields
from microdit_jax.convert.dit_infer import (
    describe_origin,
    infer_config,
    infer_config_strictly,
    interp_scale,
)
from microdit_jax.convert.dit_table import buffer_shapes, rename_table
from microdit_jax.convert.keymap import Params, to_params, to_tensors
from microdit_jax.convert.kinds import Kind
from microdit_jax.errors import UserError
from microdit_jax.models.dit import DiTConfig
from microdit_jax.models.layers import sincos_pos_embed

__all__ = [
    "KIND",
    "config_from_dict",
    "describe",
    "describe_origin",
    "from_torch",
    "infer_config",
    "to_torch",
]


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    config: DiTConfig,
    *,
    check_finite: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Params:
    """Converts the reference's state dict to parameters of `DiT(config)`.

    Strict: every tensor is used exactly once, in the shape the config asks for, and the constants
    `pos_embed` and `mask_token` must be those the network computes itself.

    Args:
      state_dict: the bare names of the reference's DiT (state_dict.py unwraps others).
      check_finite: refuse, and name, tensors with NaN or infinite values.
      progress: called with the number of bytes just checked.
    Returns:
      A nested dict of float32 numpy arrays; transposed views of the given ones where those are
      float32.
    Raises:
      UserError: tensors missing, unexpected, misshapen (all listed) or not finite, or constants
        of another resolution.
    """
    params = to_params(
        state_dict,
        rename_table(config),
        buffer_shapes(config),
        check_finite=check_finite,
        progress=progress,
    )
    if np.any(state_dict["mask_token"] != 0):
        raise UserError(
            "expected a mask_token of zeros (the reference never trains it), found other values; "
            "is this a MicroDiT checkpoint?"
        )
    found = state_dict["pos_embed"]
    wanted = sincos_pos_embed(config.dim, config.grid, config.pos_interp_scale)
    error = np.abs(found[0].astype(np.float32) - wanted).max()
    if error > 4 * float(ml_dtypes.finfo(found.dtype).eps):
        scale = interp_scale(found)
        fix = f"set pos_interp_scale={scale}, or leave the config out: it is read from the file"
        raise UserError(
            f"expected the pos_embed of pos_interp_scale {config.pos_interp_scale}, found "
            + (
                f"that of {scale}; {fix}"
                if scale
                else f"one off by {error:.1e} that no scale gives; is this a MicroDiT checkpoint?"
            )
        )
    return params


def to_torch(params: Params, config: DiTConfig) -> dict[str, np.ndarray]:
    """Converts parameters of `DiT(config)` to a state dict that the reference loads strictly.

    Returns:
      name -> array, views of the given ones wherever possible, with the constants `pos_embed` and
      `mask_token`; a float32 state dict comes back from `from_torch` bit for bit.
    Raises:
      UserError: parameters missing, unexpected or misshapen; all are listed.
    """
    shapes = buffer_shapes(config)
    pos_embed = sincos_pos_embed(config.dim, config.grid, config.pos_interp_scale)
    return {
        "pos_embed": pos_embed.reshape(shapes["pos_embed"]),
        "mask_token": np.zeros(shapes["mask_token"], np.float32),
        **to_tensors(params, rename_table(config)),
    }


def config_from_dict(fields: Mapping[str, Any]) -> DiTConfig:
    """Returns a DiTConfig from the fields of a JSON file.

    Raises:
      UserError: a field that DiTConfig does not have.
    """
    return config_from_fields(DiTConfig, fields)


def describe(config: DiTConfig) -> str:
    """Describes a config in one line."""
    mixer = f"mixer {config.patch_mixer_depth} x {config.patch_mixer_dim}"
    return (
        f"{config.depth} blocks of width {config.dim}, heads of {config.head_dim}, "
        f"{mixer if config.use_patch_mixer else 'no mixer'}, "
        f"{config.num_experts} experts of capacity {config.expert_capacity:g}, "
        f"latents {config.in_channels} x {config.input_size} x {config.input_size}, "
        f"pos_interp_scale {config.pos_interp_scale:g}, captions {config.caption_channels} wide"
    )


KIND = Kind(
    name="dit",
    part="dit",
    infer_config=infer_config_strictly,
    from_torch=from_torch,
    to_torch=to_torch,
    config_from_dict=config_from_dict,
    describe=describe,
    describe_origin=describe_origin,
    options=("head_dim", "expert_capacity"),
    stems=("diffusion_pytorch_model", "model", "pytorch_model", "dit"),
)
