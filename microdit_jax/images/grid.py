"""Sheets of images with captions."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from microdit_jax.images.files import to_uint8


def captioned_grid(
    rows: Sequence[Float[np.ndarray, "n H W 3"]],
    captions: Sequence[str],
    *,
    columns: int,
    min_side: int = 96,
) -> Float[np.ndarray, "H_grid W_grid 3"]:
    """Lays images out on a sheet with readable captions.

    Args:
      rows: sets of images whose i-th ones stand side by side in cell i: (real, sampled), say, or
        just one entry; each (n, H, W, 3) in [0, 1].
      captions: one for each cell.
      columns: cells in a row.
      min_side: small images are enlarged to at least this many pixels, without smoothing.
    """
    side = rows[0].shape[1]
    scale = -(-min_side // side)
    shown = [to_uint8(images).repeat(scale, axis=1).repeat(scale, axis=2) for images in rows]
    side, pad, font = side * scale, 6, caption_font(12)
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
        text = "\n".join(_wrap(shown_by(font, caption), font, width)[:3])
        draw.multiline_text((left, top + side + 2), text, fill="black", font=font, spacing=1)
    return np.asarray(sheet, np.float32) / 255


def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """Returns DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic, Arabic and more."""
    found = importlib.util.find_spec("matplotlib")  # without importing it, which takes a second
    assert found is not None and found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(folder / "DejaVuSans.ttf", size)


def shown_by(font: ImageFont.FreeTypeFont, text: str) -> str:
    """Replaces the letters that a font lacks, such as Chinese ones, by an empty box."""
    lacking = _look(font, "\U0010ffff")  # no font has it
    letters = " ".join(text.split())
    return "".join("\u25af" if _look(font, letter) == lacking else letter for letter in letters)


def _look(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    mask = font.getmask(letter)
    return bytes(mask)  # pyright: ignore[reportArgumentType]  (a sequence of pixels, untyped)


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
