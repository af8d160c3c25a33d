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
    """What a batch's captions are called: token ids for a tower, else stored embeddings."""
    return "caption_latents" if tower is None else "tokens"


class CaptionTower:
    """A frozen CLIP or T5 that turns the token ids of a batch into caption embeddings.

    All devices hold a copy, and each embeds the captions of its own images.

    Args:
      name: as `assets.load_text_encoder` takes it.
      dtype: type of the computation.
      mesh: the devices.
    Attributes:
      params: the weights on the devices, to be handed to the program that calls `embed`.
      name, tokenizer, width: of the tower.
    Raises:
      UserError: no such tower, or one that is no network.
    """

    def __init__(self, name: str, dtype: str, mesh: Mesh):
        encoder = load.load_text_encoder(name, dtype=dtype, mesh=mesh)
        if encoder.network is None:
            raise UserError(
                f"data.captions=tokens takes a CLIP or T5 as data.text_encoder, found {name}, "
                "whose embeddings are looked up; use data.captions=embeddings"
            )
        self._network, self._max_tokens = encoder.network, encoder.max_tokens
        self.params = encoder.network.params
        self.name, self.tokenizer, self.width = encoder.name, encoder.tokenizer, encoder.width

    def check(self, ids: Int32[np.ndarray, "n l"]) -> None:
        """Raises UserError for ids that are not the tower's; on devices they would be clipped."""
        check_ids(ids, self._max_tokens, self._network.vocab_size, self.name)

    def embed(self, params: Any, batch: Batch) -> Batch:
        """The batch with "caption_latents" (n, l, width) in place of "tokens" (n, l).

        Rounded to float16, as embeddings are stored: a run sees the same numbers either way.
        """
        rest = {name: value for name, value in batch.items() if name != "tokens"}
        captions = self._network.apply(params, batch["tokens"])
        return rest | {"caption_latents": jax.lax.stop_gradient(captions.astype(jnp.float16))}
