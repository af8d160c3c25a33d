"""MicroDiT (arXiv 2407.15811) in JAX and Flax Linen."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microdit_jax.create import create_latent_diffusion

__all__ = ["create_latent_diffusion"]


def __getattr__(name: str) -> Any:
    # On first use: neither shall importing the network alone import the whole pipeline, nor a
    # command take a quarter of a second before it answers to Ctrl-C.
    if name == "__version__":
        from importlib.metadata import version

        return version("microdit_jax")
    if name == "create_latent_diffusion":
        from microdit_jax.create import create_latent_diffusion

        return create_latent_diffusion
    raise AttributeError(f"module 'microdit_jax' has no attribute {name!r}")
