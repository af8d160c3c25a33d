import numpy as np
import pytest
from PIL import Image

from microdit_jax.data import emoji_scenes, twemoji
from microdit_jax.data.emoji_scenes import PROMPTS, Scene, is_kept_out, list_scenes, paint, plural


def disc(colour, side=16):
    """A disc on white."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    inside = (x**2 + y**2 < (side / 3) ** 2)[:, :, None]
    return np.where(inside, np.float32(colour), np.float32(1))


def hue(image):
    rgb = Image.fromarray(np.round((image + 1) * 127.5).astype(np.uint8))
    hsv = np.asarray(rgb.convert("HSV"))
    return float(np.median(hsv[..., 0][hsv[..., 1] > 100])) * 360 / 255


RED, BLUE = (0.8, -0.8, -0.8), (-0.8, -0.8, 0.8)
CAPTIONS = ["automobile", "dog", "ladybird", "stop sign", "woman", "cook", "cook dark skin tone"]
IMAGES = np.stack([disc(RED)] * 4 + [disc(BLUE)] * 3)


def test_40_prompts_and_what_is_kept_out_for_them():
    assert len(set(PROMPTS)) == 40
    assert not set(PROMPTS) & {image.caption for image in twemoji.list_images()}
    assert is_kept_out("blue", "automobile") and is_kept_out("two", "dog face")
    assert is_kept_out("cat face", "hot dog") and is_kept_out("dog", "cat")
    assert not is_kept_out("green", "dog") and not is_kept_out("blue", "hot pepper")


def test_scenes_are_the_same_each_time_and_none_is_kept_out():
    scenes = list_scenes(CAPTIONS, IMAGES)
    assert scenes == list_scenes(CAPTIONS, IMAGES)
    assert {i for scene in scenes for i in scene.things} == {0, 1, 2}  # no sign, nobody
    captions = [scene.caption for scene in scenes]
    assert "red automobile" not in captions and "red dog" in captions and "red ladybird" in captions
    coloured = [c for c in captions if c.split()[0] in emoji_scenes.COLOURS]
    assert len(coloured) == 2 + 3 + 3 and not [c for c in captions if c in ("blue dog", "two dogs")]
    assert not {"blue automobile", "green automobile", "two automobiles"} & set(captions)
    assert [len(s.things) for s in scenes if " and " in s.caption] == [2, 2, 2]


def test_another_colour():
    assert emoji_scenes.hue_of(disc((1, 1, 1))) is None
    found = emoji_scenes.hue_of(disc(RED))
    assert found is not None and found[0] == pytest.approx(0, abs=2)
    for name, wanted in emoji_scenes.COLOURS.items():
        image = paint(Scene(name, (0,), (found[0], wanted)), IMAGES)
        assert abs((hue(image) - wanted + 180) % 360 - 180) < 4
        np.testing.assert_array_equal(image[0], 1)  # the ground stays white


def test_several_things_are_halves_of_themselves():
    pair = paint(Scene("", (0, 4)), IMAGES)
    assert pair.shape == (16, 16, 3)
    small = IMAGES.reshape(7, 8, 2, 8, 2, 3).mean((2, 4))
    np.testing.assert_allclose(pair[4:12, :8], small[0], atol=1e-6)
    np.testing.assert_allclose(pair[4:12, 8:], small[4], atol=1e-6)
    assert (pair[:4] == 1).all() and (pair[12:] == 1).all()
    for count in (3, 4):
        several = paint(Scene("", (0,) * count), IMAGES)
        assert np.sum(several < 1) == pytest.approx(count * np.sum(small[0] < 1), rel=1e-6)


def test_plurals():
    for one, several in {
        "dog face": "dog faces", "fox": "foxes", "cherry": "cherries", "monkey": "monkeys",
        "face with tears of joy": "faces with tears of joy", "glasses": "glasses", "fish": "fish",
        "oncoming bus": "oncoming buses", "mouse": "mice",
    }.items():  # fmt: skip
        assert plural(one) == several
