"""PNGs with their settings, and sheets of them."""

import json

import numpy as np
import pytest
from PIL import Image

from microdit_jax import images
from microdit_jax.errors import UserError

IMAGE = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)
SETTINGS = {"seed": 7, "prompt": "ein Bär 🐻"}


def test_bytes_are_rounded_as_in_a_png():
    values = np.array([-0.1, 0.0, 0.5, 0.9999, 1.2]).reshape(1, 5, 1, 1).repeat(3, axis=-1)
    assert images.to_uint8(values)[0, :, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_pictures_carry_their_settings(tmp_path):
    file = tmp_path / "a" / "x.png"
    images.save_png(file, IMAGE, SETTINGS)
    with Image.open(file) as image:
        assert json.loads(image.text["microdit_jax"]) == SETTINGS
        np.testing.assert_array_equal(np.asarray(image), np.round(IMAGE * 255))
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert images.read_settings(file) == SETTINGS
    np.testing.assert_allclose(images.read_png(file), IMAGE, atol=0.5 / 255)
    assert images.is_made_so(file, SETTINGS)
    assert not images.is_made_so(file, SETTINGS | {"seed": 8})


def test_a_torn_picture_is_made_again(tmp_path):
    file = tmp_path / "x.png"
    images.save_png(file, np.zeros((64, 64, 3), np.float32), SETTINGS)
    file.write_bytes(file.read_bytes()[:-30])
    assert not images.is_made_so(file, SETTINGS)
    assert not images.is_made_so(tmp_path / "none.png", SETTINGS)


def test_pictures_of_others_are_refused(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "other.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "other.jpg")
    for name in ("other.png", "other.jpg", "none.png"):
        with pytest.raises(UserError, match="expected a PNG made by sample_main.py"):
            images.read_settings(tmp_path / name)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        images.save_png(tmp_path / "x.png", IMAGE, SETTINGS)
    assert not list(tmp_path.iterdir())


def test_grid_puts_pictures_side_by_side():
    red, blue = np.zeros((2, 2, 8, 8, 3), np.float32)
    red[..., 0], blue[..., 2] = 1, 1
    grid = images.captioned_grid([red, blue], ["one", "two"], columns=2, min_side=8)
    np.testing.assert_array_equal(grid[8, 8], [1, 0, 0])
    np.testing.assert_array_equal(grid[8, 8 + 8], [0, 0, 1])
