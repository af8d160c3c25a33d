"""Reference statistics: read from a file, or computed once from real images."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tqdm
from jaxtyping import UInt8
from PIL import Image

from microdit_jax.data import twemoji
from microdit_jax.errors import UserError, visible
from microdit_jax.evaluate.prompts import RUN_SPLITS
from microdit_jax.files import read_bytes
from microdit_jax.files.image_files import MAX_BYTES, open_image
from microdit_jax.images import to_uint8
from microdit_jax.metrics.features import FeatureNetwork
from microdit_jax.metrics.statistics import Reference, load_reference, save_reference

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CHUNK = 256


def crop_to(image: UInt8[np.ndarray, "_ _ 3"], side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """Returns the centre square, resized to `side` pixels by Pillow's bicubic filter."""
    height, width, _ = image.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = Image.fromarray(image[top : top + short, left : left + short])
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


def get_reference(
    source: str,
    network: FeatureNetwork,
    folder: Path,
    *,
    resolution: int,
    side: int = 0,
    emoji: Mapping[str, Sequence[str]] = twemoji.DEFAULT_SETS,
) -> Reference:
    """Returns the statistics of real images in the network's features.

    Args:
      source: .npz of statistics; a folder of images, with those in its subfolders; or "train" or
        "heldout" for the embedded emoji images.
      folder: where computed statistics are kept; they are found again by a hash of the images.
      resolution: pixels of a side of the model's images; the embedded ones are read in this size.
      side: images of a folder are cropped and resized to this many pixels first; 0: as they are.
      emoji: the sets that "train" and "heldout" mean, as `twemoji.sets_of` gives them.
    Raises:
      UserError: no statistics or images there, or statistics of other features.
    """
    if source.endswith(".npz"):
        reference = load_reference(Path(source))
        reference.check_features(network.name, network.width)
        return reference
    if source in RUN_SPLITS:
        chosen = twemoji.images_of_sets(source, emoji)
        inputs = _digest([image.path for image in chosen], {"resolution": resolution})
    else:
        files = _images_in(Path(source))
        inputs = _digest(files, {"side": side})
    key = hashlib.sha256(f"{network.name} {inputs}".encode()).hexdigest()[:16]
    path = folder / f"reference_{key}.npz"
    if path.exists():
        return load_reference(path)
    if source in RUN_SPLITS:
        images = to_uint8(twemoji.read_images(chosen, resolution) / 2 + 0.5)
        features = network(list(images))
    else:
        features = np.concatenate([network(part) for part in _read(files, side)])
    return save_reference(path, features, name=network.name, inputs=inputs)


def _images_in(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise UserError(
            f"expected .npz of statistics or a folder of images in --reference, found "
            f"{len(files)} images in {folder}"
        )
    return files


def _digest(files: Sequence[Path], about: dict) -> str:
    """Hashes the contents of all files, and how they are read."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for path in files:
        digest.update(hashlib.sha256(read_bytes(path, MAX_BYTES)).digest())
    return digest.hexdigest()


def _read(files: Sequence[Path], side: int) -> Iterator[list[np.ndarray]]:
    for start in tqdm.trange(0, len(files), CHUNK, desc="reference", unit="chunk"):
        images = [_read_image(path) for path in files[start : start + CHUNK]]
        yield [crop_to(image, side) if side else image for image in images]


def _read_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    try:
        with open_image(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow passes on any exception that its decoders raise
        raise UserError(
            f"expected an image in {visible(path)}, could not read it ({visible(error, 200)}); "
            "fetch it again or move it away"
        ) from error
