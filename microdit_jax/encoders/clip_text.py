"""CLIP's text transformer, as in OpenCLIP and Stable Diffusion: one vector for each token.

Alphabet as in microdit_jax.models: n batch, l tokens, d width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32, Shaped

from microdit_jax.encoders.clip_block import Block, TowerConfig, norm
from microdit_jax.encoders.tokenizers import PADDING, VOCABULARY_SIZE, ClipTokenizer
from microdit_jax.encoders.transformer import BATCH, PretrainedTextEncoder, check_ids, in_batches


@dataclasses.dataclass(frozen=True)
class ClipTextConfig(TowerConfig):
    """Sizes of a text tower; the defaults are DFN5B-CLIP-ViT-H-14-378's.

    Attributes:
      context_length: tokens l of a text, both markers included.
      vocab_size: rows of the token table.
      padding: id after a text's end: 0 (OpenCLIP, SD 2.x) or END_OF_TEXT (SD 1.x).
    """

    context_length: int = 77
    vocab_size: int = VOCABULARY_SIZE
    padding: int = PADDING


class ClipText(nn.Module):
    """Maps token ids (n, l) to ln_final of all tokens (n, l, d), without pooling or projection.

    Radford et al. 2021 (CLIP), section 2.4. Padding is attended to like any token, as in training.
    """

    config: ClipTextConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "n l"]) -> Float32[Array, "n l d"]:
        config = self.config
        shape = (config.context_length, config.width)
        table = nn.Embed(
            config.vocab_size, config.width, param_dtype=config.param_dtype, name="token_embedding"
        )
        position = self.param(
            "positional_embedding", nn.initializers.normal(0.01), shape, config.param_dtype
        )
        x = table(ids).astype(jnp.float32)
        x = x + jnp.broadcast_to(position[: ids.shape[1]].astype(jnp.float32), x.shape)
        for i in range(config.layers):
            x = Block(config, causal=True, name=f"resblocks_{i}")(x)
        return norm(config, "ln_final")(x)


class ClipTextEncoder(PretrainedTextEncoder):
    """A frozen CLIP text tower with its tokenizer, compiled once for each length of text.

    Attributes:
      name: that datasets and models carry to find the encoder again.
      tokenizer: its ClipTokenizer; `tokenizer.dropped(texts)` counts the tokens that are cut off.
    """

    def __init__(
        self, name: str, config: ClipTextConfig, params: Mapping[str, Any], *, batch: int = BATCH
    ):
        """Encodes texts `batch` at a time, the last batch filled up; params: `ClipText`'s."""
        self.name = name
        self.config = config
        self.params = params
        self.tokenizer = ClipTokenizer(config.context_length, padding=config.padding)
        self._batch = batch
        self._apply = jax.jit(self.forward)

    def forward(self, params: Mapping[str, Any], ids: Int[Array, "n l"]) -> Float32[Array, "n l d"]:
        """Embeds token ids as a pure function, for programs that embed captions themselves."""
        return jnp.asarray(ClipText(self.config).apply({"params": params}, ids))

    @property
    def max_tokens(self) -> int:
        """Length to which `encode_text` pads and cuts."""
        return self.config.context_length

    def encode(
        self,
        ids: Int32[np.ndarray, "n l"],
        attention_mask: Shaped[np.ndarray, "..."] | None = None,
    ) -> Float32[np.ndarray, "n l d"]:
        """Embeds token ids: (n, l, width) float32.

        Args:
          attention_mask: makes no difference: CLIP attends to padding, as it did in training.
        Raises:
          UserError: more tokens than positions, or an id outside the vocabulary.
        """
        check_ids(ids, self.config.context_length, self.config.vocab_size, self.name)
        return in_batches(self._apply, self.params, ids, size=self._batch)

    def encode_text(self, texts: Any) -> Float32[np.ndarray, "n l d"]:
        """Embeds a list of texts: (n, context_length, width) float32; raises as ClipTokenizer.

        A text that is too long is cut, with END_OF_TEXT last.
        """
        return self.encode(self.tokenizer(texts))
