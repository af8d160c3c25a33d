"""Synthetic weights: a pure function of seed and tensor name, so that a check at full size needs no
download and the same weights can be made anywhere.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from microdit_jax.convert.dit_table import buffer_shapes, rename_table
from microdit_jax.models.dit import DiTConfig
from microdit_jax.models.layers import sincos_pos_embed


def synthetic_tensor(name: str, shape: Sequence[int], seed: int) -> Float32[np.ndarray, "..."]:
    """float32 noise, scaled so that activations keep their size through a network.

    With r standard normal: 1 + 0.1 r for a norm's weight, 0.1 r for other vectors and scalars, and
    r / sqrt(fan_in) for matrices, experts (e, d, f) and convolutions.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    r = rng.standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) < 2:
        is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
        return np.asarray(np.float32(1) * is_norm + np.float32(0.1) * r)
    fan_in = shape[1] if len(shape) == 3 else math.prod(shape[1:])
    return (r / np.float64(math.sqrt(fan_in))).astype(np.float32)  # divided in float64


def synthetic_state_dict(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """A synthetic tensor for every name."""
    return {name: synthetic_tensor(name, shape, seed) for name, shape in shapes.items()}


def synthetic_dit(config: DiTConfig, seed: int) -> dict[str, np.ndarray]:
    """A state dict of the reference's DiT: synthetic weights, and its constants as they are."""
    shapes = {entry.torch_name: entry.torch_shape for entry in rename_table(config)}
    buffers = buffer_shapes(config)
    pos_embed = sincos_pos_embed(config.dim, config.grid, config.pos_interp_scale)
    return {
        "pos_embed": pos_embed.reshape(buffers["pos_embed"]),
        "mask_token": np.zeros(buffers["mask_token"], np.float32),
        **synthetic_state_dict(shapes, seed),
    }
