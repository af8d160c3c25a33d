"""Captions with meaning: MiniLM against a random table, on things that training never saw.

  python -m benchmarks.captions --out=out/captions

The demo's network and recipe on the embedded images without skin tones, twice; all is equal but the
vectors of the captions, which are 384 wide and 16 tokens long both times, so the operations are
too. Held out are things alone. Writes captions.json: held-out losses with the right captions and
with shuffled ones, for captions whose words training has and for those with a new word; and samples
of the prompts of PROMPTS, of the training words that they stand for, beside the real images. Both
runs resume.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import nearest
from configs import demo
from microdit_jax import create, sharding
from microdit_jax.assets import load
from microdit_jax.data import twemoji
from microdit_jax.data.latents import LatentSource, load_prepared
from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.files import write_json
from microdit_jax.images.files import to_uint8
from microdit_jax.models.dit import DiT
from microdit_jax.train import train
from microdit_jax.training.evaluators.heldout_loss import HeldoutLoss

ENCODERS = {"minilm": "minilm:tokens=16", "table": "table:width=384,tokens=16,seed=0"}
SOURCE = "twemoji_things_untoned"
SAMPLES = 4  # of each prompt, seed 2024
# Words of no caption -> a caption of training that shows the same thing. docs/captions.md had this
# list before the first sample was looked at.
PROMPTS = {
    **{"aeroplane": "airplane", "physician": "health worker", "bike": "bicycle"},
    **{"motorbike": "motorcycle", "cab": "taxi", "hare": "rabbit", "puppy": "dog"},
    **{"kitten": "cat", "pony": "horse face", "hen": "chicken", "rucksack": "backpack"},
    **{"serpent": "snake", "toad": "frog", "hog": "pig", "infant": "baby", "mule": "donkey"},
    **{"reindeer": "deer", "ape": "gorilla", "pumpkin": "jack-o-lantern", "maize": "ear of corn"},
    **{"aubergine": "eggplant", "burger": "hamburger", "donut": "doughnut", "biscuit": "cookie"},
    **{"pasta": "spaghetti", "timepiece": "watch", "lager": "beer mug"},
    **{"smartphone": "mobile phone", "spectacles": "glasses", "trousers": "jeans"},
    **{"jewel": "gem stone", "fiddle": "violin", "piano": "musical keyboard", "flame": "fire"},
    **{"spaceship": "rocket", "sofa": "couch and lamp", "policeman": "police officer"},
    **{"professor": "teacher", "chef": "cook", "wizard": "mage"},
}


def main() -> None:
    """Trains both networks, measures them, and writes captions.json and a sheet of samples."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/captions"))
    parser.add_argument("--steps", type=int, default=1400, help="of each network (default: 1400)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    results, sheets = {}, []
    for name, encoder in ENCODERS.items():
        for stage in ("pretrain", "finetune"):
            config = _config(flags, stage, name, encoder)
            train(config, flags.out / f"{name}-{flags.seed}" / stage)
    for name in ENCODERS:
        folder = flags.out / f"{name}-{flags.seed}"
        results[name] = _losses(folder / "finetune", flags.out / name)
        for kind, prompts in (("synonym", list(PROMPTS)), ("word", list(PROMPTS.values()))):
            images = _samples(folder / "finetune", prompts, folder / f"{kind}.npy")
            right = np.mean([_nearest(images[i]) for i in range(SAMPLES)], axis=0)
            results[name][kind] = {
                "samples right": float(right.mean()),
                "prompts right in half or more": int((right >= 0.5).sum()),
                "share by prompt": dict(zip(PROMPTS, right.tolist(), strict=True)),
            }
            sheets.append(images[0])
        print(name, json.dumps(results[name], indent=1), flush=True)
    write_json(flags.out / f"captions-{flags.seed}.json", results)
    _write_sheet(flags.out / f"captions-{flags.seed}.png", [_real(), *sheets])


def _config(flags: argparse.Namespace, stage: str, name: str, encoder: str) -> ConfigDict:
    config = demo.get_config(stage)
    dataset = {"source": SOURCE, "folder": str(flags.out / name)}
    config.data.datasets = ({**dataset, "weight": 1.0},)
    config.data.heldout.update(dataset)
    config.data.text_encoder = encoder
    config.model.options.caption_channels = 384
    config.seed = flags.seed
    config.optim.decay_steps = flags.steps
    config.train.steps = round(flags.steps * 300 / 1400) if stage == "pretrain" else flags.steps
    config.train.update(checkpoint_every=100, eval_every=flags.steps)
    config.eval.evaluators = ("heldout_loss",)
    return config


def _losses(run: Path, folder: Path) -> dict[str, Any]:
    """Measures the held-out losses of a run's averaged weights, by kind of caption."""
    train_set, heldout, *_ = load_prepared(folder, PatchPCA.load)
    known = {word for caption in train_set.captions for word in caption.split()}
    old = [known.issuperset(caption.split()) for caption in heldout.captions]
    model = load.load_model(str(run))
    parts: dict[str, LatentSource] = {
        "all": heldout,
        "known words": heldout.subset(old),
        "a new word": heldout.subset([not o for o in old]),
    }
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    found = {}
    for part, source in parts.items():
        loss = HeldoutLoss(
            DiT(model.config), model.edm, mesh, source,
            num_images=len(source), batch_size=64, noise_samples=16,
        )  # fmt: skip
        found[part] = {"images": len(source), **loss(model.params)}
    return found


def _samples(run: Path, prompts: list[str], path: Path) -> np.ndarray:
    """Samples SAMPLES images of each prompt: (SAMPLES, n, 32, 32, 3) in [0, 1]; guidance 3."""
    if not path.exists():
        pipe = create.from_model(load.load_model(str(run)))
        options = {"solver": "ab3", "num_inference_steps": 20, "guidance_scale": 3.0, "seed": 2024}
        np.save(path, pipe.generate(prompts * SAMPLES, **options))
    images = np.load(path)
    return images.reshape(SAMPLES, len(prompts), *images.shape[1:])


def _real() -> np.ndarray:
    """Reads the real images of the words that PROMPTS stand for: (n, 32, 32, 3) in [0, 1]."""
    images = {image.caption: image for image in twemoji.list_images()}
    return twemoji.read_images([images[word] for word in PROMPTS.values()], 32) / 2 + 0.5


def _nearest(images: np.ndarray) -> np.ndarray:
    """Tells which samples have the right one of the 40 real images as their nearest one.

    Distances are of the images as 8 x 8 averages, without each one's mean colour; by chance one in
    forty is right.
    """

    own = range(len(images))
    return nearest.right(images, own, _real(), own)


def _write_sheet(path: Path, rows: list[np.ndarray]) -> None:
    """Writes real images above, then samples of each network: synonyms, and training's words."""
    halves = [
        np.concatenate(list(part[a:b]), axis=1) for a, b in ((0, 20), (20, 40)) for part in rows
    ]
    Image.fromarray(to_uint8(np.vstack(halves)).repeat(2, 0).repeat(2, 1)).save(path)


if __name__ == "__main__":
    main()
