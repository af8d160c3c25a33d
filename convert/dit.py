"""The network's converter under its short name: {name: array} <-> parameters, strict."""

from microdit_jax.convert.dit import from_torch, to_torch

__all__ = ["from_torch", "to_torch"]
