"""Judges an instant model by what docs/instant2.md fixed before training.

  python -m benchmarks.instant2 --model=instant2 --beside=instant --out=out/judged
  python -m benchmarks.instant2 --model=out/instant2 --ema_length=0.1 --out=out/judged-run

Writes judged.json, and sheets of held-out things, compositional prompts and synonyms: above each
caption stand a real image, what the model beside samples, if one is named, and what the model
samples. A model that was not held out of the things has most likely seen them.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import captions, nearest
from microdit_jax import create
from microdit_jax.data import emoji_scenes, twemoji
from microdit_jax.data.emoji_scenes import COLOURS, NUMBERS, Scene
from microdit_jax.files import write_json
from microdit_jax.images import captioned_grid
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.training.metric_writer import METRICS_FILE
from tools.instant_sheets import save
from tools.ship_instant import last_heldout

THINGS = 64
# Nouns of the compositional prompts -> emoji that show such a thing
SHOWN: dict[str, tuple[str, ...]] = {
    "car": ("automobile",),
    "dog": ("dog", "dog face"),
    "cat": ("cat", "cat face"),
    "bird": ("bird",),
    "horse": ("horse", "horse face"),
    "fish": ("fish", "tropical fish"),
    "apple": ("red apple", "green apple"),
    "house": ("house with garden", "derelict house"),
    "flower": ("blossom", "sunflower"),
    "hat": ("top hat", "woman's hat"),
    "tree": ("evergreen tree", "deciduous tree"),
    "star": ("glowing star",),
    "ball": ("soccer ball", "basketball"),
    "moon": ("full moon", "crescent moon"),
    "cup": ("teacup without handle", "cup with straw"),
    "heart": ("red heart",),
    "umbrella": ("umbrella", "closed umbrella"),
}


def main() -> None:
    """Samples, judges, and writes figures and sheets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="out/instant2")
    parser.add_argument("--out", type=Path, default=Path("out/instant2-judged"))
    parser.add_argument("--ema_length", type=float, help="of the average, from a run's snapshots")
    parser.add_argument("--beside", help="another model, whose samples the sheets show as well")
    parser.add_argument("--samples", type=int, default=4, help="of each prompt (default: 4)")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    pipe, model = create.load(flags.model, ema_length=flags.ema_length)
    beside = create.load(flags.beside)[0] if flags.beside else None
    listed = {image.caption: image for image in twemoji.list_images()}
    images = dict(
        zip(listed, (twemoji.read_images(list(listed.values()), 32) + 1) / 2, strict=True)
    )
    heldout = [image.caption for image in twemoji.images_of("heldout", "things")]
    things = [heldout[int(i)] for i in np.linspace(0, len(heldout) - 1, THINGS)]
    synonyms = captions.PROMPTS
    real: dict[str, dict[str, list[np.ndarray]]] = {
        "things": {caption: [images[caption]] for caption in things},
        "compositions": {prompt: compositions(prompt, images) for prompt in emoji_scenes.PROMPTS},
        "synonyms": {prompt: [images[word]] for prompt, word in synonyms.items()},
        "their words": {word: [images[word]] for word in synonyms.values()},
    }
    found: dict[str, Any] = {"model": model.description}
    if model.folder is not None and (model.folder / METRICS_FILE).is_file():
        found["heldout"] = last_heldout(model.folder)
    for kind, prompts in real.items():
        sheet = flags.out / f"{kind.replace(' ', '_')}.png"
        found[kind] = judge(pipe, prompts, flags.samples, sheet, beside)
        about = {key: value for key, value in found[kind].items() if key != "share by prompt"}
        print(kind, about, flush=True)
    write_json(flags.out / "judged.json", found)


def compositions(prompt: str, images: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Makes the real images of a compositional prompt, in [0, 1], from those of its nouns."""
    first, last = emoji_scenes.parts(prompt)
    names = SHOWN.get(last, (last,))
    if first in COLOURS:
        scenes = [_in_colour(images[name], first) for name in names]
    elif first in NUMBERS:
        scenes = [_beside([images[name]] * NUMBERS[first]) for name in names]
    else:
        pairs = itertools.product(SHOWN.get(first, (first,)), names)
        scenes = [_beside([images[a], images[b]]) for a, b in pairs]
    return scenes


def _in_colour(image: np.ndarray, colour: str) -> np.ndarray:
    """Returns an image in a colour; as it is where it has not one colour."""
    hue = emoji_scenes.hue_of(image * 2 - 1)
    if hue is None:
        return image
    return _beside([image], (hue[0], COLOURS[colour]))


def _beside(things: list[np.ndarray], hue: tuple[float, float] | None = None) -> np.ndarray:
    scene = Scene("", tuple(range(len(things))), hue)
    return emoji_scenes.paint(scene, np.stack(things) * 2 - 1) / 2 + 0.5


def judge(
    pipe: LatentDiffusion,
    real: dict[str, list[np.ndarray]],
    samples: int,
    sheet: Path,
    beside: LatentDiffusion | None = None,
) -> dict[str, Any]:
    """Samples prompts, counts those that are right, and writes a sheet of the first sample."""
    prompts: Sequence[str] = list(real)
    options = {"solver": "ab3", "num_inference_steps": 20, "guidance_scale": 3.0, "seed": 2024}
    images = pipe.generate(list(prompts) * samples, **options)
    others = [] if beside is None else [beside.generate(list(prompts), **options)]
    owners = [i for i, prompt in enumerate(prompts) for _ in real[prompt]]
    references = np.stack([image for prompt in prompts for image in real[prompt]])
    wanted = list(range(len(prompts))) * samples
    right = nearest.right(images, wanted, references, owners).reshape(samples, -1).mean(0)
    first = np.stack([real[prompt][0] for prompt in prompts])
    rows = [first, *others, images[: len(prompts)]]
    columns = 8 - 2 * len(others)  # about as wide
    save(sheet, captioned_grid(rows, prompts, columns=columns, min_side=64))
    return {
        "samples right": float(right.mean()),
        "prompts right in half or more": int((right >= 0.5).sum()),
        "of": len(prompts),
        "share by prompt": dict(zip(prompts, right.tolist(), strict=True)),
    }


if __name__ == "__main__":
    main()
