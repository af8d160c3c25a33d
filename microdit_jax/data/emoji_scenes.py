"""Scenes put together from emoji: one in another colour, several of one, two side by side.

The emoji's own names hardly combine: there are red apples and green ones, but no blue horse and no
two dogs. Scenes teach what colours and numbers mean. The combinations of PROMPTS are left out, so
that these prompts ask for what no training image shows.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from microdit_jax.data.twemoji import things_mask

# Compositional prompts, fixed before the first training with scenes (docs/instant2.md).
PROMPTS = (
    *("red car", "blue car", "green car", "purple cat", "blue dog", "red bird", "yellow bird"),
    *("green horse", "blue apple", "yellow flower", "red fish", "purple fish", "green house"),
    *("blue rose", "yellow guitar", "red bicycle", "green balloon", "yellow umbrella"),
    *("two dogs", "two cats", "two cars", "two birds", "two apples", "two hats", "three fish"),
    *("three flowers", "three balls", "three bananas", "four stars", "four trees"),
    *("cat and dog", "apple and banana", "dog and ball", "car and tree", "sun and moon"),
    *("cup and pizza", "rose and heart", "rocket and star", "cat and fish", "bird and flower"),
)
# Nouns of the prompts -> words of captions that show such a thing
_MEANT = {
    "car": "car automobile taxi",
    "bird": "bird chick",
    "fish": "fish blowfish",
    "house": "house houses hut",
    "flower": "flower blossom hibiscus rose sunflower",
    "hat": "hat cap helmet",
    "ball": "ball basketball volleyball baseball softball tennis soccer",
    "cup": "cup teacup",
    "star": "star stars",
    "heart": "heart hearts",
}
# Degrees of hue, as Twemoji has them
COLOURS = {
    **{"red": 352.0, "orange": 30.0, "yellow": 45.0, "green": 98.0, "blue": 206.0, "purple": 264.0}
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
# Captions with one of these are signs and writing, and no things.
_SIGNS = frozenset(
    "button keycap arrow arrows sign symbol mark square circle triangle diamond o'clock input latin"
    " suit no not emblem loop medal skin aries taurus cancer leo virgo libra scorpio sagittarius"
    " capricorn aquarius registered information multiply plus minus divide".split()
)
_PLURALS = {
    **{"mouse": "mice", "ox": "oxen", "wolf": "wolves", "knife": "knives", "leaf": "leaves"},
    **{"tooth": "teeth", "goose": "geese", "bus": "buses", "minibus": "minibuses"},
    **{"fish": "fish", "sheep": "sheep", "deer": "deer"},
}
_HALVED = 2  # a scene's things have half the side


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene: its caption, the indices of its things, and a hue to paint them in."""

    caption: str
    things: tuple[int, ...]
    hue: tuple[float, float] | None = None  # that the thing has, and that it gets; degrees


def is_thing(caption: str) -> bool:
    """Returns True for a caption that scenes may be made of: no sign, no writing, no time."""
    return not _SIGNS & set(caption.split()) and "thirty" not in caption


def is_kept_out(first: str, second: str) -> bool:
    """Returns True if a prompt of PROMPTS asks for this combination.

    Args:
      first: a colour, a number or a caption.
      second: a caption.
    """
    return any(
        (_asks(a, first) and _asks(b, second)) or (_asks(b, first) and _asks(a, second))
        for a, b in map(parts, PROMPTS)
    )


def parts(prompt: str) -> tuple[str, str]:
    """Splits a prompt of PROMPTS: a colour, a number or a noun, and a noun in the singular."""
    first, _, second = prompt.replace(" and ", " ").partition(" ")
    return first, second.removesuffix("s") if first in NUMBERS else second


def _asks(word: str, caption: str) -> bool:
    return bool(set(_MEANT.get(word, word).split()) & set(caption.split()))


def words(captions: Sequence[str]) -> frozenset[str]:
    """Returns the words that the captions of scenes add to those of the things themselves."""
    whole = things_mask(captions)
    things = (caption for caption, kept in zip(captions, whole, strict=True) if kept)
    plurals = {plural(caption) for caption in things if is_thing(caption)}
    return frozenset((*COLOURS, *NUMBERS, "and", *(w for text in plurals for w in text.split())))


def list_scenes(captions: Sequence[str], images: Float[np.ndarray, "n h w 3"]) -> list[Scene]:
    """Lists the scenes of captioned images in [-1, 1], the same each time; no people are in them.

    Of each thing of one colour: its own colour by name, and two others. Of each thing: two, three
    or four of it; and it beside another thing.
    """
    whole = things_mask(captions)
    things = [i for i, caption in enumerate(captions) if whole[i] and is_thing(caption)]
    return [
        scene
        for i in things
        for scene in (
            *_coloured(captions, images, i),
            *_counted(captions, i),
            *_beside(captions, i, things),
        )
    ]


def _rng(text: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def _coloured(
    captions: Sequence[str], images: Float[np.ndarray, "n h w 3"], i: int
) -> Iterator[Scene]:
    caption = captions[i]
    found = hue_of(images[i])
    if found is None or {*COLOURS, *"white black brown pink grey".split()} & set(caption.split()):
        return
    hue, brightness = found
    apart = {name: abs(_angle(hue - other)) for name, other in COLOURS.items()}
    own = min(apart, key=lambda name: apart[name])
    free = {name for name in COLOURS if not is_kept_out(name, caption)}
    if apart[own] < 20 and brightness > 0.65 and own in free:
        yield Scene(f"{own} {caption}", (i,))
    others = sorted(name for name in free if apart[name] > 35)
    for name in _rng(f"colour:{caption}").permutation(others)[:2]:
        yield Scene(f"{name} {caption}", (i,), (hue, COLOURS[name]))


def _counted(captions: Sequence[str], i: int) -> Iterator[Scene]:
    caption = captions[i]
    free = [name for name in NUMBERS if not is_kept_out(name, caption)]
    if free and not {*NUMBERS, "and"} & set(caption.split()):
        name = str(_rng(f"number:{caption}").choice(free))
        yield Scene(f"{name} {plural(caption)}", (i,) * NUMBERS[name])


def _beside(captions: Sequence[str], i: int, things: Sequence[int]) -> Iterator[Scene]:
    for n in _rng(f"beside:{captions[i]}").choice(len(things), 8):
        j = things[int(n)]
        pair = captions[i], captions[j]
        if i != j and not is_kept_out(*pair) and all("and" not in c.split() for c in pair):
            yield Scene(" and ".join(pair), (i, j))
            return


def plural(caption: str) -> str:
    """Returns the plural of a caption's noun, which is the last word before "with" and the like."""
    words = caption.split()
    ends = [i for i, word in enumerate(words) if word in {"with", "of", "on", "in", "without"}]
    last = (ends[0] if ends and ends[0] else len(words)) - 1
    word = words[last]
    if word in _PLURALS:
        word = _PLURALS[word]
    elif word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        word = word[:-1] + "ies"
    elif not word.endswith("s"):
        word += "es" if word.endswith(("x", "ch", "sh")) else "s"
    return " ".join([*words[:last], word, *words[last + 1 :]])


# ------------------------------------------------------------------ images
def hue_of(image: Float[np.ndarray, "h w 3"]) -> tuple[float, float] | None:
    """Returns the hue in degrees and the brightness of a thing of one colour on white, else None.

    Args:
      image: in [-1, 1].
    """
    hue, saturation, value = _hsv(image)
    coloured = (saturation > 0.3) & (value > 0.2)
    drawn = (saturation > 0.1) | (value < 0.9)
    if coloured.sum() < max(0.4 * drawn.sum(), 0.05 * drawn.size):
        return None
    mean = np.mean(saturation[coloured] * np.exp(1j * np.deg2rad(hue[coloured])))
    if abs(mean) < 0.8 * saturation[coloured].mean():
        return None
    return float(np.rad2deg(np.angle(mean)) % 360), float(value[coloured].mean())


def paint(scene: Scene, images: Float[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "h w 3"]:
    """Puts a scene together from all images, which lie in [-1, 1] and on white."""
    things = images[list(scene.things)]
    if scene.hue is not None:
        return _recoloured(things[0], *scene.hue)
    if len(things) == 1:
        return things[0]
    n, h, w, _ = things.shape
    small = things.reshape(n, h // _HALVED, _HALVED, w // _HALVED, _HALVED, 3).mean((2, 4))
    canvas = np.ones_like(things[0])
    middle, right = (h - h // 2) // 2, w // 2
    spots = {
        2: ((middle, 0), (middle, right)),
        3: ((0, (w - w // 2) // 2), (h // 2, 0), (h // 2, right)),
        4: ((0, 0), (0, right), (h // 2, 0), (h // 2, right)),
    }
    for (top, left), thing in zip(spots[n], small, strict=True):
        canvas[top : top + h // 2, left : left + w // 2] = thing
    return canvas


def _recoloured(image: Float[np.ndarray, "h w 3"], hue: float, wanted: float) -> np.ndarray:
    """Turns the hues near one towards another; they keep half of their distances."""
    hues, saturation, value = _hsv(image)
    apart = _angle(hues - hue)
    near = (np.abs(apart) < 50) & (saturation > 0.05)
    hues = np.where(near, wanted + apart / 2, hues) % 360
    if 20 < wanted < 60:  # else orange and yellow would be brown
        value = np.where(near, np.sqrt(value), value)
    hsv = np.stack([hues * 255 / 360, saturation * 255, value * 255], axis=-1)
    rgb = Image.fromarray(np.round(hsv).astype(np.uint8), "HSV").convert("RGB")
    return np.asarray(rgb, np.float32) / 127.5 - 1


def _hsv(image: Float[np.ndarray, "h w 3"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns hue in degrees, and saturation and value in [0, 1]."""
    rgb = np.round((image + 1) * 127.5).clip(0, 255).astype(np.uint8)
    hsv = np.asarray(Image.fromarray(rgb).convert("HSV"), np.float32) / 255
    return hsv[..., 0] * 360, hsv[..., 1], hsv[..., 2]


def _angle(degrees):
    """Returns an angle from -180 to 180."""
    return (degrees + 180) % 360 - 180
