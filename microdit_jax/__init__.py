"""MicroDiT (arXiv 2407.15811) in JAX and Flax Linen."""

from importlib.metadata import version
from typing import Any

__version__ = version("microdit_jax")
__all__ = ["create_latent_diffusion"]


def __getattr__(name: str) -> Any:
    # On first use: importing the network alone shall not import the whole pipeline.
    if name == "create_latent_diffusion":
        from microdit_jax.create import create_latent_diffusion

        return create_latent_diffusion
    raise AttributeError(f"module 'microdit_jax' has no attribute {name!r}")
