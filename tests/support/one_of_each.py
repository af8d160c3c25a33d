"""A network with one block of each kind, and meshes to train it on."""

import jax
import numpy as np
from jax.sharding import Mesh

from microdit_jax import sharding
from microdit_jax.diffusion import EdmConfig
from microdit_jax.models.dit import DiTConfig

CONFIG = DiTConfig(
    input_size=8, in_channels=4, dim=32, depth=2, head_dim=8, multiple_of=16, caption_channels=24,
    patch_mixer_depth=1, patch_mixer_dim=16, patch_mixer_mlp_ratio=2.0, use_bias=False,
    num_experts=8, expert_capacity=2.0, experts_every_n=1,
)  # fmt: skip
EDM = EdmConfig()


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
    """A mesh over as many of the simulated devices as it takes.

    Args:
      sizes: of data, fsdp and expert; or of data, slices, fsdp and expert.
    """
    devices = jax.devices()[: int(np.prod(sizes))]
    data, *across, fsdp, expert = sizes
    slices = across[0] if across else 1
    return sharding.make_mesh(data, slices * fsdp, expert, devices, across=slices)
