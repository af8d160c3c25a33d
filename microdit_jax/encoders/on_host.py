"""Common part of text encoders that look their vectors up on the host, without a network."""

from typing import TypeVar

from jax.sharding import Sharding

Encoder = TypeVar("Encoder", bound="OnHost")


class OnHost:
    """A text encoder of vectors that need no download and no device."""

    @property
    def pretrained(self) -> bool:
        """False: it is for networks trained on the embedded images."""
        return False

    @property
    def network(self) -> None:
        """None: embeddings are looked up on the host."""
        return None

    def with_sharding(self: Encoder, sharding: Sharding) -> Encoder:
        """Returns itself: it computes on the host."""
        return self
