"""PNGs that say how they were made, and sheets of them with captions."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from microdit_jax.errors import UserError
from microdit_jax.files import write_bytes

KEY = "microdit_jax"  # of the PNG text that holds the settings


def to_uint8(images: Float[np.ndarray, "*n H W 3"]) -> UInt8[np.ndarray, "*n H W 3"]:
    """[0, 1] floats to bytes, rounded."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def file_name(index: int, prompt: str) -> str:
    """A short name that tells pictures apart: "0003_an-elegant-squirrel-pirate-on-a-ship.png"."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return f"{index:04d}_{slug}.png"


def encode_png(image: Float[np.ndarray, "H W 3"], settings: dict) -> bytes:
    """The bytes of a PNG of [0, 1] floats, with the settings as its text "microdit_jax"."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt(KEY, json.dumps(settings, ensure_ascii=False))
    Image.fromarray(to_uint8(image)).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_png(path: Path, image: Float[np.ndarray, "H W 3"], settings: dict) -> None:
    """Writes what `encode_png` makes, whole or not at all."""
    write_bytes(path, encode_png(image, settings))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_png` wrote into a picture.

    Raises:
      UserError: no such file, not a picture, or none of ours.
    """
    try:
        with Image.open(path) as image:
            return json.loads(image.text[KEY])  # only PNGs have .text
    except (OSError, UnidentifiedImageError, AttributeError, KeyError, ValueError) as error:
        raise UserError(
            f"expected a PNG made by sample_main.py, with its settings inside, at {path}, found "
            f"{type(error).__name__}: {error}; give such a file"
        ) from error


def read_png(path: Path) -> Float[np.ndarray, "H W 3"]:
    """A picture in [0, 1], float32."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float32) / 255


def is_made_so(path: Path, settings: dict) -> bool:
    """Whether the picture is there, whole, and was made with these settings."""
    try:
        found = path.is_file() and read_settings(path) == json.loads(json.dumps(settings))
        return found and read_png(path).size > 0
    except (UserError, OSError):
        return False


def captioned_grid(
    rows: Sequence[Float[np.ndarray, "n H W 3"]],
    captions: Sequence[str],
    *,
    columns: int,
    min_side: int = 96,
) -> Float[np.ndarray, "H_grid W_grid 3"]:
    """A sheet of pictures with readable captions.

    Args:
      rows: pictures that belong together, side by side in one cell: (real, sample), say, or just
        one entry; each (n, H, W, 3) in [0, 1].
      captions: one for each cell.
      columns: cells in a row.
      min_side: small pictures are enlarged to at least this many pixels, without smoothing.
    """
    side = rows[0].shape[1]
    scale = -(-min_side // side)
    shown = [to_uint8(images).repeat(scale, axis=1).repeat(scale, axis=2) for images in rows]
    side, pad, font = side * scale, 6, ImageFont.load_default(12)
    width, text_height = len(rows) * side, 44
    cell_width, cell_height = width + 2 * pad, side + text_height + 2 * pad
    lines = -(-len(captions) // columns)
    columns = min(columns, len(captions))
    sheet = Image.new("RGB", (columns * cell_width, lines * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        left, top = (i % columns) * cell_width + pad, (i // columns) * cell_height + pad
        for j, images in enumerate(shown):
            sheet.paste(Image.fromarray(images[i]), (left + j * side, top))
        text = "\n".join(_wrap(caption, font, width)[:3])
        draw.multiline_text((left, top + side + 2), text, fill="black", font=font, spacing=1)
    return np.asarray(sheet, np.float32) / 255


def _wrap(text: str, font, width: int) -> list[str]:
    """Breaks a caption into lines that are at most `width` pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
