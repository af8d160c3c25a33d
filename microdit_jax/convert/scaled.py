"""Applies the scales that weights in 8-bit floating types are stored with.

A layer's real weight is its float8 tensor times a scale that lies beside it: `scale_weight`, as
ComfyUI names it, or `weight_scale`, as compressed-tensors, ModelOpt and diffusers do. There is one
scale for a layer, or one for each row. Scales of its inputs are for matmuls in float8 alone.
"""

from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from microdit_jax.convert.formats.torch_names import DTYPES
from microdit_jax.errors import UserError, visible

FLOAT8 = frozenset(np.dtype(kind) for name, (kind, _) in DTYPES.items() if "float8" in name)
SCALES = ("scale_weight", "weight_scale")
# Blocks of rows and columns that share a scale, as DeepSeek has them.
UNSUPPORTED = ("weight_scale_inv", "scale_weight_inv")
OF_INPUTS = ("scale_input", "input_scale")
MARK = "scaled_fp8"  # an empty tensor by which ComfyUI tells such a file


def apply_scales(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Multiplies float8 weights by their scales; other tensors come back as they are.

    Returns:
      The tensors, scaled ones in float32 and without the scales, and notes of what was done.
    Raises:
      UserError: a scale without its float8 weight, or of a shape that is not supported.
    """
    result = dict(tensors)
    scaled = aside = 0
    for name in tensors:
        layer, _, last = name.rpartition(".")
        start = f"{layer}." if layer else ""
        if last in OF_INPUTS or last == MARK:
            # A network may have a parameter of such a name; then there is no float8 beside it.
            if last == MARK or _is_float8(tensors.get(f"{start}weight")):
                del result[name]
                aside += last != MARK
        elif last in UNSUPPORTED:
            _refuse(name, tensors[name], "weights with one scale each, or one for each row")
        elif last in SCALES:
            weight = tensors.get(f"{start}weight")
            if weight is None or not _is_float8(weight):
                _refuse(name, tensors[name], f"{start}weight in a float8 type beside its scale")
            result[f"{start}weight"] = _scaled(name, weight, tensors[name])
            del result[name]
            scaled += 1
    notes = [f"multiplied {scaled} float8 weights by their scales"] if scaled else []
    notes += [f"ignored {aside} scales of inputs"] if aside else []
    return result, notes


def _is_float8(tensor: np.ndarray | None) -> bool:
    return tensor is not None and tensor.dtype in FLOAT8


def _scaled(name: str, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weight times its scale, float32."""
    rows, column = weight.shape[:1], (*weight.shape[:1], *[1] * (weight.ndim - 1))
    one_each = bool(rows) and scale.shape in (rows, column)
    if scale.dtype.kind not in "fV" or (scale.size != 1 and not one_each):
        _refuse(name, scale, f"one scale, or one for each of the rows of {weight.shape}")
    factor = scale.astype(np.float32).reshape(column if scale.size != 1 else ())
    return weight.astype(np.float32) * factor


def _refuse(name: str, scale: np.ndarray, wanted: str) -> NoReturn:
    raise UserError(
        f"expected {visible(wanted, 200)}, found {visible(name, 200)} {scale.dtype} {scale.shape}; "
        "such scales are not supported: save the weights in bfloat16 or float32"
    )
