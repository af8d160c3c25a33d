"""Synthetic weights of the FID network, as the golden activations were computed with."""

import math
import zlib

import numpy as np

from microdit_jax.convert.inception import rename_table
from microdit_jax.metrics.inception import InceptionConfig

FULL = InceptionConfig()
NARROW = InceptionConfig(divisor=16)


def synthetic(name: str, shape) -> np.ndarray:
    """float32 noise that keeps activations alive; what the golden activations were made with."""
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    r = rng.standard_normal(tuple(shape), dtype=np.float32)
    if name.endswith("running_var"):
        return np.float32(0.5) + np.abs(r)
    if name.endswith("bn.weight"):
        return np.float32(1) + np.float32(0.1) * r
    if len(shape) < 2:
        return np.float32(0.1) * r
    return (r * np.float64(math.sqrt(2 / math.prod(shape[1:])))).astype(np.float32)


def synthetic_tensors(config: InceptionConfig) -> dict[str, np.ndarray]:
    return {e.torch_name: synthetic(e.torch_name, e.torch_shape) for e in rename_table(config)}
