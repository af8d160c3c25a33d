"""Protocols of the frozen networks around the diffusion model: what each of them promises.

`encoders/` implements them, `assets/` loads them by name, and everything else takes them as they
are described here. An implementation need not inherit from its protocol; pyright compares the two.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped, UInt8

from microdit_jax.errors import UserError


@runtime_checkable  # so that tests check each argument that is annotated as one
class Codec(Protocol):
    """Turns images into latents and back."""

    @property
    def name(self) -> str:
        """Name that datasets and models carry to find the codec again."""
        ...

    @property
    def channels(self) -> int:
        """Channels c of the latents."""
        ...

    @property
    def scaling_factor(self) -> float:
        """Factor on the codec's latents before the diffusion model sees them."""
        ...

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along a side of the image for one latent, 8 for Stable Diffusion's."""
        ...

    @property
    def on_device(self) -> bool:
        """True if JAX computes it on the device of its weights, False for NumPy on the host."""
        ...

    def encode(
        self,
        images: Float[np.ndarray, "n H W colours"],
        *,
        noise: Float[np.ndarray, "n h w c"] | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """Encodes images (n, H, W, 3) in [-1, 1] as latents (n, h, w, channels), float32.

        They are not multiplied by `scaling_factor`.

        Args:
          noise: standard normal numbers to sample from the encoder's distribution with; None takes
            its mode. A deterministic encoder's distribution is a point, the same for any noise.
        """
        ...

    def decode(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n H W colours"]:
        """Decodes such latents (n, h, w, channels) to images (n, H, W, 3), float32 in [-1, 1]."""
        ...

    def with_sharding(self, sharding: Sharding) -> "Codec":
        """Returns the codec with its weights laid out by `sharding`.

        A codec that computes on the host returns itself.
        """
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """Turns texts into token ids of one length."""

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n l"]:
        """Returns the ids (n, l) of n texts, each padded or cut to l tokens."""
        ...

    def dropped(self, texts: Sequence[str]) -> Int32[np.ndarray, " n"]:
        """Counts the tokens of each text that `__call__` cuts off."""
        ...


@dataclasses.dataclass(frozen=True)
class TextNetwork:
    """A text encoder's network as a pure function, for programs that embed captions themselves.

    Attributes:
      apply: (params, ids (n, l)) -> embeddings (n, l, width) float32; may be traced.
      params: its weights, on the devices that are to compute.
      vocab_size: ids are 0 to vocab_size - 1.
    """

    apply: Callable[[Any, Int[Array, "n l"]], Float32[Array, "n l d"]]
    params: Any
    vocab_size: int


@runtime_checkable
class TextEncoder(Protocol):
    """Turns texts into one embedding per token."""

    @property
    def name(self) -> str:
        """Name that datasets and models carry to find the encoder again."""
        ...

    @property
    def width(self) -> int:
        """Width of a token's embedding."""
        ...

    @property
    def max_tokens(self) -> int:
        """Length l to which `encode_text` pads and cuts."""
        ...

    @property
    def pretrained(self) -> bool:
        """False for a random table, whose embeddings say which words there are and no meaning.

        Only networks trained on the embedded emoji images use one.
        """
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None if it was loaded without: then only ids can be encoded."""
        ...

    @property
    def network(self) -> TextNetwork | None:
        """Its network as a pure function; None if embeddings are looked up on the host."""
        ...

    def encode(
        self,
        ids: Int32[np.ndarray, "n l"],
        attention_mask: Shaped[np.ndarray, "..."] | None = None,
    ) -> Float32[np.ndarray, "n l d"]:
        """Embeds token ids: (n, l, width).

        Args:
          attention_mask: (n, l), nonzero where there is text; None: where the id is not padding.
            T5 and BERT use it. CLIP attends to padding, as in training, whatever the mask.
        """
        ...

    def encode_text(self, texts: Sequence[str]) -> Float32[np.ndarray, "n l d"]:
        """Embeds texts: (n, max_tokens, width)."""
        ...

    def with_sharding(self, sharding: Sharding) -> "TextEncoder":
        """Returns the encoder with its weights laid out by `sharding`.

        An encoder that computes on the host returns itself.
        """
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """Embeds images and texts in one space, where cosines compare them: a CLIP."""

    @property
    def name(self) -> str:
        """Name that scores carry to say which network gave them."""
        ...

    def encode_images(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    ) -> Float32[np.ndarray, "n e"]:
        """Embeds uint8 images of any size: (n, e), not normalised."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n e"]:
        """Embeds texts, each cut to the context length: (n, e), not normalised."""
        ...


def tokenizer_of(encoder: TextEncoder) -> Tokenizer:
    """Returns an encoder's tokenizer; raises UserError if it was loaded without one."""
    if encoder.tokenizer is None:
        raise no_tokenizer(encoder.name)
    return encoder.tokenizer


def no_tokenizer(name: str) -> UserError:
    """Returns the error for texts given to an encoder that was loaded without its tokenizer."""
    return UserError(
        f"expected a tokenizer with {name}, found none; put spiece.model and tokenizer_config.json "
        "(of a BERT tokenizer.json) into the folder tokenizer/ of the model's, or give "
        "T5Tokenizer(FOLDER) or BertTokenizer(FOLDER)"
    )
