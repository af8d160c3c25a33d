"""The text tower in the train step, for datasets that store token ids instead of embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from microdit_jax.assets import load
from microdit_jax.encoders.transformer import check_ids
from microdit_jax.errors import UserError
from microdit_jax.training.loss import Batch


def batch_key(tower: "CaptionTower | None") -> str:
    """Returns the batch's key for captions: token ids for a tower, else stored embeddings."""
    return "caption_latents" if tower is None else "tokens"


class CaptionTower:
    """A frozen CLIP, T5 or BERT that turns the token ids of a batch into caption embeddings.

    All devices hold a copy, and each embeds the captions of its own images.

    Args:
      name: of the tower, in a form that `assets.load_text_encoder` accepts.
      dtype: type of the computation.
      mesh: devices that hold a copy.
    Attributes:
      params: the weights on the devices, an argument of the program that calls `embed`.
      name: of the tower.
      tokenizer: turns captions into token ids.
      width: of an embedding.
    Raises:
      UserError: no such tower, or one that is no network.
    """

    def __init__(self, name: str, dtype: str, mesh: Mesh):
        encoder = load.load_text_encoder(name, dtype=dtype, mesh=mesh)
        if encoder.network is None:
            raise UserError(
                f"data.captions=tokens takes a CLIP, T5 or BERT as data.text_encoder, found "
                f"{name}, whose embeddings are looked up; use data.captions=embeddings"
            )
        self._network, self._max_tokens = encoder.network, encoder.max_tokens
        self.params = encoder.network.params
        self.name, self.tokenizer, self.width = encoder.name, encoder.tokenizer, encoder.width

    def check(self, ids: Int32[np.ndarray, "n l"]) -> None:
        """Raises UserError for ids outside the vocabulary, which devices would clip unseen."""
        check_ids(ids, self._max_tokens, self._network.vocab_size, self.name)

    def embed(self, params: Any, batch: Batch) -> Batch:
        """Replaces "tokens" (n, l) in a batch by "caption_latents" (n, l, width), float16.

        Stored embeddings are float16 too, so a run sees the same numbers either way.
        """
        rest = {name: value for name, value in batch.items() if name != "tokens"}
        captions = self._network.apply(params, batch["tokens"])
        return rest | {"caption_latents": jax.lax.stop_gradient(captions.astype(jnp.float16))}
