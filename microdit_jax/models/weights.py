"""The network's weights by name: which are cast, and which are whose."""

from typing import Any

import jax

from microdit_jax.models.config import DiTConfig

# Modules that multiply in float32 whatever the config's type; `cast_matrices` spares them.
FLOAT32_MODULES = ("t_embedder", "pooled_y_emb_process", "adaLN_modulation_1", "gate")


def block_names(config: DiTConfig) -> list[str]:
    """Names of the weights of all blocks, in the order in which they run."""
    mixer = [f"patch_mixer_{i}" for i, _ in enumerate(config.mixer_blocks())]
    return mixer + [f"blocks_{i}" for i, _ in enumerate(config.backbone_blocks())]


def cast_matrices(params: Any, config: DiTConfig) -> Any:
    """Casts matrices to the type that the network multiplies them in, and leaves vectors alone.

    Before an all-gather of the weights this halves the bytes and changes no result: the network
    would cast them itself.
    """

    def cast(path, leaf):
        spared = any(key.key in FLOAT32_MODULES for key in path)
        return leaf if spared or leaf.ndim < 2 else leaf.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
