"""Draws docs/instant.png and docs/instant-before.png: held-out captions, and the demo beside it.

  make demo && python -m tools.instant_sheets      (MODEL=... takes another than the one shipped)

Run it again when the weights change.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from microdit_jax import create
from microdit_jax.commands.parser import Parser
from microdit_jax.images import captioned_grid, to_uint8
from microdit_jax.sampling import guidance

DOCS = Path(__file__).parent.parent / "docs"
BEFORE = "out/demo/finetune"
# All but the last were shown in training, one as "crying cat".
CAPTIONS = (
    "hot pepper", "red apple", "rocket", "dog face", "pizza", "penguin", "tiger face", "blue heart",
    "crying cat face", "mushroom", "firefighter medium skin tone", "woman mechanic dark skin tone",
)  # fmt: skip
HELDOUT = 64


def main(arguments: Sequence[str]) -> None:
    Parser("tools.instant_sheets", __doc__).parse_args(arguments)
    pipe, model = create.load(os.environ.get("MODEL", "instant"))
    before, _ = create.load(BEFORE)
    options = {
        "guidance_scale": guidance.default_scale(pipe.text_encoder, recorded=model.guidance_scale),
        "seed": 2024,
    }

    captions, real = create.heldout_images(model, HELDOUT)
    rows = [pipe.decode(real), pipe.generate(captions, **options)]
    save(DOCS / "instant.png", captioned_grid(rows, captions, columns=8, min_side=64))

    rows = [p.generate(list(CAPTIONS), **options) for p in (before, pipe)]
    larger = rows[1].shape[1] // rows[0].shape[1]
    rows[0] = rows[0].repeat(larger, axis=1).repeat(larger, axis=2)
    save(DOCS / "instant-before.png", captioned_grid(rows, CAPTIONS, columns=4))


def save(path: Path, sheet: Float[np.ndarray, "H W 3"]) -> None:
    """Writes a sheet in 256 colours, at a third of the bytes."""
    image = Image.fromarray(to_uint8(sheet)).quantize(256, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
