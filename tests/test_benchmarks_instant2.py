"""The rules by which an instant model is judged (docs/instant2.md)."""

import numpy as np

from benchmarks import instant2, nearest
from microdit_jax.data import emoji_scenes, twemoji


def test_a_sample_is_right_if_one_of_its_own_images_is_nearest():
    real = np.random.default_rng(0).uniform(size=(3, 16, 16, 3))
    owners = [0, 1, 1]  # two images show the second prompt
    brighter = real + 0.5  # mean colours make no difference
    assert nearest.right(brighter, [0, 1, 1], real, owners).tolist() == [True, True, True]
    assert nearest.right(real, [1, 0, 1], real, owners).tolist() == [False, False, True]


def test_every_compositional_prompt_has_images_made_of_emoji():
    images = {image.caption: np.ones((32, 32, 3)) for image in twemoji.images_of("train", "things")}
    red = np.ones((32, 32, 3))
    red[8:24, 8:24] = 0.9, 0.1, 0.1
    images["automobile"] = red
    for prompt in emoji_scenes.PROMPTS:
        made = instant2.compositions(prompt, images)
        assert made and all(image.shape == (32, 32, 3) for image in made)
    (blue,) = instant2.compositions("blue car", images)
    assert blue[16, 16, 2] > 2 * blue[16, 16, 0] and (blue[0] == 1).all()
    (two,) = instant2.compositions("two cars", images)
    assert two[16, 8, 1] < 0.2 and two[16, 24, 1] < 0.2 and two[16, 15, 1] == 1
