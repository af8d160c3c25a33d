"""Parts that the text towers share: attention with an additive bias, and full batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int32, Shaped

from microdit_jax.errors import UserError
from microdit_jax.machine.placement import map_batches
from microdit_jax.towers import TextNetwork

BATCH = 2  # texts that a tower embeds at once by default: a prompt and the empty text
# Added to a score; finite, so that a row of nothing but padding gives a mean and not NaN.
MASKED = np.finfo(np.float32).min


class PretrainedTextEncoder:
    """Members that CLIP's and T5's encoders share (part of `towers.TextEncoder`).

    Attributes:
      config: sizes, with `width` and `vocab_size`.
      params: the network's weights, on the devices that compute.
      forward: (params, ids (n, l)) -> embeddings (n, l, width) float32, a pure function.
    """

    config: Any
    params: Any
    forward: Callable[..., Any]

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        return self.config.width

    @property
    def pretrained(self) -> bool:
        """True: it was trained on text."""
        return True

    @property
    def network(self) -> TextNetwork:
        """The encoder as a pure function of its weights and token ids."""
        return TextNetwork(self.forward, self.params, self.config.vocab_size)


def attend(
    q: Float[Array, "n t f"],
    k: Float[Array, "n l f"],
    v: Float[Array, "n l f"],
    bias: Float32[Array, "#n #h t l"],
    *,
    heads: int,
    scale: float,
) -> Float[Array, "n t f"]:
    """Computes softmax(scale q k^T + bias) v for each head; scores and softmax in float32."""
    q, k, v = (rearrange(x, "n s (h c) -> n s h c", h=heads) for x in (q, k, v))
    scores = jnp.einsum("nthc,nlhc->nhtl", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(scores + jnp.broadcast_to(bias, scores.shape), axis=-1)
    out = jnp.einsum("nhtl,nlhc->nthc", weights.astype(v.dtype), v)
    return rearrange(out, "n t h c -> n t (h c)")


def check_ids(ids: Int32[np.ndarray, "n l"], length: int, vocab_size: int, name: str) -> None:
    """Raises UserError if a tower's positions or vocabulary do not cover the ids."""
    if ids.shape[1] > length:
        raise UserError(
            f"{name}: expected at most {length} tokens, found {ids.shape[1]}; cut the texts"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise UserError(
            f"{name}: expected token ids 0 to {vocab_size - 1}, found {ids.min()} to {ids.max()}; "
            "use the tower's own tokenizer"
        )


def check_texts(texts: Any) -> None:
    """Raises UserError unless `texts` is a list of strings."""
    if not isinstance(texts, list | tuple | np.ndarray):
        raise UserError(
            f"texts: expected a list of strings; found {type(texts).__name__}; put it in a list"
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(
                f"texts: expected strings; found {type(text).__name__} at index {index}; "
                "decode bytes, or leave missing captions as ''"
            )


def in_batches(
    function: Callable[..., Array], params: Any, *arrays: Shaped[np.ndarray, "n l"], size: int
) -> Float32[np.ndarray, "n l d"]:
    """Applies function(params, *arrays) in batches of exactly `size` rows: one compiled program.

    The last batch is filled up, and the filling's results are cut off. On a mesh, `size` is rounded
    up to a multiple of its devices.
    """
    n = len(arrays[0])
    # Without rows, one of zeros tells the shape of the results.
    rows = arrays if n else [np.zeros((1, *a.shape[1:]), a.dtype) for a in arrays]
    indices = np.arange(max(n, 1))
    found = map_batches(
        function, params, indices, lambda part: tuple(a[part] for a in rows), size=size
    )
    return found[:n].astype(np.float32)
