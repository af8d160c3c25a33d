"""Image files that carry the settings they were sampled with."""

import io
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import (
    Image,
    JpegImagePlugin,  # noqa: F401 (Pillow imports all its plugins for a format it has not met)
    PngImagePlugin,
    WebPImagePlugin,  # noqa: F401
)

from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json, write_bytes
from microdit_jax.files.image_files import open_image

KEY = "microdit_jax"  # of the PNG text, or of the EXIF text's JSON, that holds the settings
FORMATS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}  # endings of file names
READ = ("PNG", "WEBP", "JPEG")
DESCRIPTION = 0x010E  # EXIF's ImageDescription
MOST_EXIF = 65_000  # bytes; a JPEG's segment holds 65,533
QUALITY = 95  # of WebP and JPEG


def to_uint8(images: Float[np.ndarray, "*n H W 3"]) -> UInt8[np.ndarray, "*n H W 3"]:
    """Rounds [0, 1] floats to bytes."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def file_name(index: int, prompt: str, form: str = "png", seed: int | None = None) -> str:
    """Returns a short name such as "0003_an-elegant-squirrel-pirate-on-a-ship.png".

    Letters of any script stay; a disk's 255 bytes for a name hold all of it.

    Args:
      form: one of FORMATS.
      seed: part of the name, where images of several lie side by side.
    """
    words = unicodedata.normalize("NFC", prompt.lower())
    slug = (
        re.sub(r"[\W_]+", "-", words)
        .strip("-")[:60]
        .encode(errors="ignore")[:180]
        .decode(errors="ignore")
    )
    of_seed = "" if seed is None else f"_seed-{seed}"
    return f"{index:04d}_{slug}{of_seed}{FORMATS[form]}"


def encode_image(image: Float[np.ndarray, "H W 3"], settings: dict, form: str = "png") -> bytes:
    """Encodes [0, 1] floats as an image file of one of FORMATS, with the settings inside.

    WebP and JPEG hold them as EXIF's ImageDescription, and lose a little of the image.

    Raises:
      UserError: settings that are too long for a JPEG, by their prompt.
    """
    if form == "png":
        return encode_png(image, settings)
    exif, file = Image.Exif(), io.BytesIO()
    exif[DESCRIPTION] = json.dumps({KEY: settings})
    written = exif.tobytes()
    if len(written) > MOST_EXIF:
        raise UserError(
            f"expected settings of at most {MOST_EXIF} bytes in a {form} file, found "
            f"{len(written)}; give a shorter prompt, or take png"
        )
    options = {"subsampling": 0} if form == "jpeg" else {"method": 4}
    pixels = Image.fromarray(to_uint8(image))
    pixels.save(file, format=form.upper(), quality=QUALITY, exif=written, **options)
    return file.getvalue()


def encode_png(image: Float[np.ndarray, "H W 3"], settings: dict) -> bytes:
    """Encodes [0, 1] floats as a PNG, with the settings as its text "microdit_jax"."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt(KEY, json.dumps(settings, ensure_ascii=False))
    Image.fromarray(to_uint8(image)).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_png(path: Path, image: Float[np.ndarray, "H W 3"], settings: dict) -> None:
    """Writes a PNG with its settings, whole or not at all."""
    write_bytes(path, encode_png(image, settings))


def save_image(
    path: Path, image: Float[np.ndarray, "H W 3"], settings: dict, form: str = "png"
) -> None:
    """Writes an image file with its settings, whole or not at all."""
    write_bytes(path, encode_image(image, settings, form))


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings that `save_image` wrote into a file, whatever they are.

    Raises:
      UserError: no such file, not an image, or one without settings of ours.
    """
    try:
        with open_image(path, formats=READ) as image:
            if image.format == "PNG":
                found = parse_json(image.info[KEY])
            else:
                found = parse_json(image.getexif()[DESCRIPTION])[KEY]
        if not isinstance(found, dict):
            raise ValueError("settings that are no JSON object")
        return found
    # A stranger's file: Pillow answers damage with anything from SyntaxError to zlib.error.
    except Exception as error:
        raise UserError(
            f"expected a PNG made by sample_main.py, with its settings inside, at {visible(path)}, "
            f"found {type(error).__name__}: {visible(error, 200)}; give such a file"
        ) from error


def read_png(path: Path) -> Float[np.ndarray, "H W 3"]:
    """Reads an image of any of FORMATS as float32 in [0, 1]."""
    with open_image(path, formats=READ) as image:
        return np.asarray(image.convert("RGB"), np.float32) / 255


def is_made_so(path: Path, settings: dict) -> bool:
    """Returns True if the file is there, whole, and carries exactly these settings."""
    try:
        found = path.is_file() and read_settings(path) == parse_json(json.dumps(settings))
        return found and read_png(path).size > 0
    except Exception:  # Pillow answers damage with anything
        return False
