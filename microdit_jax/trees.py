"""Nested trees as flat dictionaries by path ("blocks_3/attn/qkv"), and back."""

from collections.abc import Mapping
from typing import Any

import jax


def flatten(tree: Any) -> dict[str, Any]:
    """Returns every leaf by its path, in JAX's order: dictionary keys sorted, None left out."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dictionaries; the inverse of `flatten` for them."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
