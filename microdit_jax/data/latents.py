"""Latents and caption embeddings held in memory, read from a folder made by `prepare.emoji_set`.

This package knows no codecs: `load_prepared` is handed a function that reads one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from microdit_jax.data.records import check_made_by
from microdit_jax.errors import UserError, visible
from microdit_jax.files import read_json, read_npz
from microdit_jax.towers import Codec

FORMAT, FORMAT_VERSION = "microdit_jax prepared latents", 2


class LatentSource:
    """Random access to latents and their captions, all in memory.

    Attributes:
      latents: (n, h, w, channels), already multiplied by the VAE's scaling factor.
      caption_latents: (n, l, width) embeddings of all caption tokens; float16 saves memory.
      captions: the n texts.
      vae, text_encoder: names of the towers that made them; see `check_made_by`.
    """

    def __init__(
        self,
        latents: Float[np.ndarray, "n h w c"],
        caption_latents: Float[np.ndarray, "n l d"],
        captions: Sequence[str],
        *,
        vae: str,
        text_encoder: str,
    ):
        if not len(latents) == len(caption_latents) == len(captions):
            raise UserError(
                f"expected as many latents as captions, found {len(latents)} latents, "
                f"{len(caption_latents)} caption embeddings and {len(captions)} captions: "
                f"prepare the data again"
            )
        self.latents = latents
        self.caption_latents = caption_latents
        self.captions = tuple(captions)
        self.vae = vae
        self.text_encoder = text_encoder

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a record as described in `microdit_jax.data.records`; its id is its index."""
        return {
            "latents": self.latents[index].astype(np.float32),
            "caption_latents": self.caption_latents[index].astype(np.float16),
            "caption": self.captions[index],
            "id": str(index),
            "index": np.int32(index),
        }

    def rows(self, indices: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Stacks the arrays of these records."""
        return {
            "latents": self.latents[indices].astype(np.float32, copy=False),
            "caption_latents": self.caption_latents[indices].astype(np.float16, copy=False),
            "index": indices.astype(np.int32),
        }

    def subset(self, keep: Sequence[bool]) -> "LatentSource":
        """Keeps the records whose entry in `keep` is true, in their order and numbered anew."""
        chosen = np.flatnonzero(keep)
        return LatentSource(
            self.latents[chosen],
            self.caption_latents[chosen],
            [self.captions[i] for i in chosen],
            vae=self.vae,
            text_encoder=self.text_encoder,
        )

    def check_made_by(self, *, vae: str, text_encoder: str) -> None:
        """Raises UserError unless the data come from this VAE and this text encoder."""
        check_made_by((vae, text_encoder), (self.vae, self.text_encoder))


class Prepared(NamedTuple):
    """Contents of a prepared folder: two sources, the codec, and meta.json."""

    train: LatentSource
    heldout: LatentSource
    codec: Codec
    meta: dict[str, Any]


def load_prepared(folder: Path, load_codec: Callable[[Path], Codec]) -> Prepared:
    """Reads a prepared folder: (train, heldout, codec, meta).

    Args:
      folder: written by `prepare.emoji_set.prepare_emoji_set`.
      load_codec: called with the codec's folder.
    Raises:
      UserError: if the folder is missing, unfinished or damaged.
    """
    meta = read_meta(folder)
    if meta is None or meta.get("version") != FORMAT_VERSION:
        found = (
            "no such folder"
            if meta is None
            else f"data of version {visible(meta.get('version'), 60)}"
        )
        raise UserError(
            f"expected prepared data, version {FORMAT_VERSION}, in {folder}, found {found}: "
            f"prepare the data first"
        )
    try:
        names = {"vae": meta["vae"], "text_encoder": meta["text_encoder"]}
        if not all(isinstance(name, str) for name in names.values()):
            raise ValueError("names of towers that are no texts")
        captions = read_json(folder / "captions.json")
        sources = {}
        for split in ("train", "heldout"):
            arrays = read_npz(folder / f"{split}.npz")
            if not all(isinstance(caption, str) for caption in captions[split]):
                raise ValueError("captions that are no texts")
            sources[split] = LatentSource(
                arrays["latents"], arrays["caption_latents"], captions[split], **names
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"expected whole prepared data in {folder}, could not read them ({visible(error)}): "
            f"delete the folder and prepare the data again"
        ) from error
    return Prepared(sources["train"], sources["heldout"], load_codec(folder / "codec"), meta)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Reads meta.json of a finished folder of this format, any version; None if there is none."""
    try:
        meta = read_json(folder / "meta.json")
    except (OSError, ValueError):
        return None
    return meta if meta.get("format") == FORMAT else None
