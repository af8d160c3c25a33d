"""A whole CLIP: both towers and their projections into one space (Radford et al. 2021)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, UInt8

from microdit_jax.encoders.clip_image import ClipImage, ClipImageConfig, to_pixels
from microdit_jax.encoders.clip_text import ClipText, ClipTextConfig
from microdit_jax.encoders.tokenizers import ClipTokenizer
from microdit_jax.machine.placement import map_batches


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers, and the width of the space they share."""

    text: ClipTextConfig
    image: ClipImageConfig
    embed_dim: int = 1024


class Clip(nn.Module):
    """Embeds pixels and token ids as (n, e), not normalised."""

    config: ClipConfig

    def setup(self):
        cfg, init = self.config, nn.initializers.normal(0.01)
        self.text, self.image = ClipText(cfg.text), ClipImage(cfg.image)
        for name, tower in (("text", cfg.text), ("image", cfg.image)):
            shape = (tower.width, cfg.embed_dim)
            setattr(self, f"{name}_projection", self.param(f"{name}_projection", init, shape))
        # The training loss's temperature; no score uses it, but checkpoints have it.
        self.logit_scale = self.param("logit_scale", nn.initializers.zeros, ())

    def encode_image(self, pixels: Float32[Array, "n H W 3"]) -> Float32[Array, "n e"]:
        """Embeds prepared pixels."""
        return _project(self.image(pixels), self.image_projection)

    def encode_text(self, ids: Int[Array, "n l"]) -> Float32[Array, "n e"]:
        """Embeds token ids, each text at its end marker."""
        # The end marker has the highest id, so argmax finds its first position.
        tokens, end = self.text(ids), jnp.argmax(ids, axis=1)
        return _project(tokens[jnp.arange(len(ids)), end], self.text_projection)

    def __call__(
        self, pixels: Float32[Array, "n H W 3"], ids: Int[Array, "m l"]
    ) -> tuple[Float32[Array, "n e"], Float32[Array, "m e"]]:
        return self.encode_image(pixels), self.encode_text(ids)


def _project(x: Float32[Array, "n d"], kernel: Float32[Array, "d e"]) -> Float32[Array, "n e"]:
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


class ClipEncoder:
    """A frozen CLIP with its tokenizer and image preparation, on the devices of its weights.

    Attributes:
      name: that scores carry to say which CLIP gave them.
    """

    def __init__(self, name: str, config: ClipConfig, params: Any, *, batch: int = 32):
        """Embeds images and texts `batch` at a time, the last batch filled up."""
        self.name, self.config, self.params, self._batch = name, config, params, batch
        self.tokenizer = ClipTokenizer(config.text.context_length, padding=config.text.padding)
        apply = Clip(config).apply
        self._image = jax.jit(lambda params, x: apply({"params": params}, x, method="encode_image"))
        self._text = jax.jit(lambda params, x: apply({"params": params}, x, method="encode_text"))

    def encode_images(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    ) -> Float32[np.ndarray, "n e"]:
        """Embeds uint8 images of any size."""
        return self._embed(self._image, images, lambda part: to_pixels(part, self.config.image))

    def encode_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n e"]:
        """Embeds texts, each cut to the context length."""
        return self._embed(self._text, texts, lambda part: self.tokenizer(list(part)))

    def _embed(self, function, items, prepare):
        if not len(items):
            return np.zeros((0, self.config.embed_dim), np.float32)
        return map_batches(function, self.params, items, prepare, size=self._batch)
