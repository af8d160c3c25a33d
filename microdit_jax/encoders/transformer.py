"""Parts that the text towers share: attention with an additive bias, and full batches."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped

from microdit_jax.errors import UserError
from microdit_jax.machine.placement import map_batches
from microdit_jax.towers import TextNetwork, Tokenizer, no_tokenizer

BATCH = 2  # texts that a tower embeds at once by default: a prompt and the empty text
# Added to a score; finite, so that a row of nothing but padding gives a mean and not NaN.
MASKED = np.finfo(np.float32).min
PADDING = 0  # T5's and BERT's, after a text's end

Encoder = TypeVar("Encoder", bound="PretrainedTextEncoder")


class PretrainedTextEncoder:
    """Members that all pretrained encoders share (part of `towers.TextEncoder`).

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

    def with_sharding(self: Encoder, sharding: Sharding) -> Encoder:
        """Returns the encoder with its weights laid out by `sharding`."""
        copied = copy.copy(self)  # the compiled program comes along
        copied.params = jax.device_put(self.params, sharding)
        return copied


@runtime_checkable  # so that tests check each argument that is annotated as one
class MaskingTokenizer(Tokenizer, Protocol):
    """A tokenizer that says which ids are text."""

    def with_mask(
        self, texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "n l"], Bool[np.ndarray, "n l"]]:
        """Returns the ids (n, l), and which of them are text rather than padding."""
        ...


class MaskedTextEncoder(PretrainedTextEncoder):
    """A frozen tower in which no token attends to padding, compiled once for each length of text.

    Subclasses compute `embed`.

    Attributes:
      name: that datasets and models carry to find the encoder again.
      tokenizer: texts to ids and mask; None: only `encode` works.
    """

    def __init__(
        self,
        name: str,
        config: Any,
        params: Mapping[str, Any],
        tokenizer: MaskingTokenizer | None = None,
        *,
        batch: int = BATCH,
    ):
        """Encodes texts `batch` at a time, the last batch filled up; params: the network's."""
        self.name = name
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self._batch = batch
        self._apply = jax.jit(self.forward)

    def embed(
        self, params: Mapping[str, Any], ids: Int[Array, "n l"], mask: Bool[Array, "n l"]
    ) -> Float32[Array, "n l d"]:
        """Embeds token ids as a pure function; the mask is true at text."""
        raise NotImplementedError

    def forward(
        self,
        params: Mapping[str, Any],
        ids: Int[Array, "n l"],
        mask: Bool[Array, "n l"] | None = None,
    ) -> Float32[Array, "n l d"]:
        """Embeds token ids as a pure function; the mask is as `encode` takes it."""
        return self.embed(params, ids, ids != PADDING if mask is None else mask)

    @property
    def max_tokens(self) -> int:
        """Length to which `encode_text` pads and cuts."""
        return self.config.max_tokens

    def encode(
        self,
        ids: Int32[np.ndarray, "n l"],
        attention_mask: Shaped[np.ndarray, "..."] | None = None,
    ) -> Float32[np.ndarray, "n l d"]:
        """Embeds token ids: (n, l, width) float32.

        Args:
          attention_mask: (n, l), nonzero where there is text; None: where the id is not padding.
        Raises:
          UserError: more ids than positions, one outside the vocabulary, or a mask of another
            shape.
        """
        check_ids(ids, self.positions or ids.shape[1], self.config.vocab_size, self.name)
        mask = ids != PADDING if attention_mask is None else np.asarray(attention_mask) != 0
        if mask.shape != ids.shape:
            raise UserError(
                f"attention_mask: expected the shape {ids.shape} of the ids, found {mask.shape}"
            )
        return in_batches(self._apply, self.params, ids, mask, size=self._batch)

    @property
    def positions(self) -> int | None:
        """Most ids that `encode` takes at once; None: any number."""
        return None

    def encode_text(self, texts: Any) -> Float32[np.ndarray, "n l d"]:
        """Embeds a list of texts: (n, max_tokens, width) float32; raises as its tokenizer."""
        if self.tokenizer is None:
            raise no_tokenizer(self.name)
        return self.encode(*self.tokenizer.with_mask(texts))


def pad(
    encoded: Sequence[Sequence[int]], length: int
) -> tuple[Int32[np.ndarray, "n {length}"], Bool[np.ndarray, "n {length}"]]:
    """Fills up texts' tokens, none longer than `length`, with padding: ids, and a mask of text."""
    ids = np.full((len(encoded), length), PADDING, np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, tokens in enumerate(encoded):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, True
    return ids, mask


def attend(
    q: Float[Array, "n t f"],
    k: Float[Array, "n l f"],
    v: Float[Array, "n l f"],
    bias: Float32[Array, "#n #h #t l"],
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
