"""Decoded images and captions to records: latents and embeddings, batch by batch, in order.

A record depends on its own image, caption and id alone: every batch runs the same program, and the
noise that a latent is sampled with is a function of the seed and the image's id.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Float, Float32, Int

from microdit_jax.errors import UserError, visible
from microdit_jax.machine.placement import full_batches
from microdit_jax.prepare.decoding import DecodedImage
from microdit_jax.prepare.options import PrepareOptions
from microdit_jax.prepare.pixels import to_float
from microdit_jax.towers import Codec, TextEncoder, tokenizer_of

Record = dict[str, Any]  # column -> text or array


class SkippedImage(NamedTuple):
    """An image without a record, and why."""

    id: str
    reason: str


# ------------------------------------------------------------------ towers
@dataclasses.dataclass(frozen=True)
class DeviceTowers:
    """A VAE and a text encoder with their weights on one device.

    Attributes:
      device: the jax.Device that computes.
      seed: of the noise that latents are sampled with.
    """

    codec: Codec
    text_encoder: TextEncoder
    device: Any
    seed: int

    @property
    def scaling_factor(self) -> float:
        """Factor of raw latents in what is stored."""
        return float(self.codec.scaling_factor)

    def latents(
        self, images: Float[np.ndarray, "n H W 3"], ids: Sequence[str]
    ) -> Float[np.ndarray, "n h w c"]:
        """Samples the latents of images in [-1, 1], multiplied by `scaling_factor`."""
        with jax.default_device(self.device):
            sides = (side // self.codec.pixels_per_latent for side in images.shape[1:3])
            shape = (*sides, self.codec.channels)
            noise = np.stack([image_noise(self.seed, id, shape) for id in ids])
            latents = self.codec.encode(images, noise=noise)
        return latents * np.float32(self.codec.scaling_factor)

    def embeddings(self, texts: Sequence[str]) -> Float[np.ndarray, "n l width"]:
        """Embeds all tokens of each text."""
        with jax.default_device(self.device):
            return self.text_encoder.encode_text(list(texts))

    def tokens(self, texts: Sequence[str]) -> Int[np.ndarray, "n l"]:
        """Returns the token ids of each text."""
        return tokenizer_of(self.text_encoder)(list(texts))


def make_towers(codec: Codec, text_encoder: TextEncoder, seed: int) -> list[DeviceTowers]:
    """Copies both towers to each of this process's devices; to one if NumPy computes the codec."""
    towers = []
    for device in jax.local_devices() if codec.on_device else jax.local_devices()[:1]:
        here = SingleDeviceSharding(device)
        copies = codec.with_sharding(here), text_encoder.with_sharding(here)
        towers.append(DeviceTowers(*copies, device, seed))
    return towers


def image_noise(seed: int, id: str, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Standard normal noise to sample a latent with: a function of these arguments alone."""
    digest = hashlib.sha256(f"{seed}/{shape}/{id}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.standard_normal(shape, np.float32)


# ------------------------------------------------------------------ batches
class _Batch(NamedTuple):
    """Images of one part that are encoded together, and those skipped among them."""

    part: int
    images: list[DecodedImage]
    skipped: list[SkippedImage]
    ends_part: bool


def encode_parts(
    decoded: Iterator[tuple[int, DecodedImage | None]],
    towers: Sequence[DeviceTowers],
    options: PrepareOptions,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[int, Record | SkippedImage | None]]:
    """Yields the number of a part and one of its records or skipped images; None ends a part.

    Args:
      decoded: from `decode_parts`.
      pool: of as many threads as there are towers.
    """
    free = collections.deque(towers)  # never empty: the pool has no more threads than towers
    waiting: collections.deque[tuple[_Batch, Future[list[Record]]]] = collections.deque()

    def encode(batch: _Batch) -> list[Record]:
        chosen = free.popleft()
        try:
            return _encode_batch(chosen, batch.images, options)
        finally:
            free.append(chosen)

    def oldest() -> Iterator[tuple[int, Record | SkippedImage | None]]:
        batch, records = waiting.popleft()
        ends = [None] if batch.ends_part else []
        for item in (*records.result(), *batch.skipped, *ends):
            yield batch.part, item

    for batch in _batches(decoded, options.batch):
        waiting.append((batch, pool.submit(encode, batch)))
        while len(waiting) > 2 * len(towers):
            yield from oldest()
    while waiting:
        yield from oldest()


def _batches(decoded: Iterator[tuple[int, DecodedImage | None]], size: int) -> Iterator[_Batch]:
    """Groups the images of one part, `size` at a time; the last batch of a part is smaller."""
    images, skipped = [], []
    for part, image in decoded:
        if image is not None and image.skip_reason is not None:
            skipped.append(SkippedImage(image.id, image.skip_reason))
        elif image is not None:
            images.append(image)
        if image is None or len(images) == size:
            yield _Batch(part, images, skipped, ends_part=image is None)
            images, skipped = [], []


def _encode_batch(
    towers: DeviceTowers, images: list[DecodedImage], options: PrepareOptions
) -> list[Record]:
    if not images:
        return []
    (batch,) = full_batches(len(images), options.batch)
    filled = [images[row] for row in batch.rows]
    ids, texts = [image.id for image in filled], [image.caption for image in filled]
    columns: dict[str, np.ndarray] = {}
    for i, side in enumerate(options.resolutions):
        crops = to_float(np.stack([image.crops[i] for image in filled]))
        latents = towers.latents(crops, ids).astype(np.float16)
        columns[f"latents_{side}"] = np.moveaxis(latents, -1, 1)  # n h w c -> n c h w
    if options.stores_embeddings:
        columns["caption_latents"] = towers.embeddings(texts).astype(np.float16)
    if options.stores_tokens:
        columns["caption_tokens"] = towers.tokens(texts).astype(np.int32)
    for name, values in columns.items():
        if not np.isfinite(values).all():
            raise UserError(
                f"expected {name} that float16 can hold, found NaN or infinity near "
                f"{visible(ids[0])}; use "
                "--dtype=float32, or check the towers' weights"
            )
    return [
        {"id": image.id, "caption": image.caption}
        | {name: np.ascontiguousarray(values[row]) for name, values in columns.items()}
        for row, image in enumerate(images)
    ]
