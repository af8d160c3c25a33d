"""Sixty captioned images, and a mask, where a page asks for the reader's own."""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (204, 51, 51), "yellow": (230, 200, 60), "green": (60, 160, 80), "blue": (60, 90, 200),
    "purple": (130, 70, 170),
}  # fmt: skip
SHAPES = ("star", "circle", "square")
WALLS = {"white": (240, 240, 235), "grey": (150, 150, 155), "brick": (170, 110, 90)}
SIDE = 256


def write(folder: Path, count: int = 60) -> None:
    """Writes NN.jpg and NN.txt: a coloured shape on a wall, with some noise."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    kinds = itertools.cycle(itertools.product(COLORS, SHAPES, WALLS))
    for number, (color, shape, wall) in zip(range(count), kinds, strict=False):
        image = Image.new("RGB", (SIDE, SIDE), WALLS[wall])
        x, y = random.integers(112, 144, 2)
        size = int(random.integers(60, 90))
        draw = ImageDraw.Draw(image)
        if shape == "star":
            angles = np.pi * (np.arange(10) / 5 - 0.5)
            radii = np.where(np.arange(10) % 2, 0.45, 1.0) * size
            corners = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1)
            draw.polygon([tuple(corner) for corner in corners.tolist()], fill=COLORS[color])
        else:
            draw_shape = draw.ellipse if shape == "circle" else draw.rectangle
            draw_shape((x - size, y - size, x + size, y + size), fill=COLORS[color])
        noisy = np.asarray(image) + random.normal(0, 4, (SIDE, SIDE, 3))
        pixels = noisy.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.jpg", quality=92)
        (folder / f"{number:02}.txt").write_text(f"a {color} {shape} on a plain {wall} wall\n")


def write_mask(path: Path) -> None:
    """Writes a mask as sample_main.py takes it: white where the image is to be made anew."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, SIDE // 2 :] = 255
    Image.fromarray(mask).save(path)
