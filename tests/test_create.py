"""Pipelines put together: what is asked for arrives, and held-out images come back."""

import dataclasses

import numpy as np
import pytest

import microdit_jax
from microdit_jax import create
from microdit_jax.assets import known_words, load
from microdit_jax.checkpoints.run import write_run_metadata
from microdit_jax.data import twemoji
from microdit_jax.encoders import registry
from microdit_jax.errors import UserError
from microdit_jax.evaluate.prompts import read_prompts


def test_ema_arrives():
    """The instant model has the moving average alone, and says so where the other is asked for."""
    with pytest.raises(UserError, match="ema=False"):
        microdit_jax.create_latent_diffusion(checkpoint="instant", ema=False)
    with pytest.raises(UserError, match="ema=False"):
        create.load("instant", ema=False)


def test_latents_of_heldout_images_decode_to_them():
    pipe, model = create.load("instant")
    captions, latents = create.heldout_images(model, 5)
    decoded = pipe.decode(latents)
    by_caption = {image.caption: image for image in twemoji.images_of("heldout")}
    real = twemoji.read_images([by_caption[caption] for caption in captions], 32)
    assert len(set(captions)) == 5
    expected = pipe.codec.decode(pipe.codec.encode(real)) / 2 + 0.5
    np.testing.assert_allclose(decoded, expected, atol=1e-5)
    # The codec keeps most of each image, not all.
    assert np.mean(np.square(expected - (real / 2 + 0.5))) ** 0.5 < 0.06


def test_a_run_s_own_split_is_evaluated(tmp_path):
    """Of a run with things held out; the instant model keeps the rule that it was trained by."""
    model = load.load_model("instant", with_params=False)
    assert known_words.emoji_sets(model)["heldout"] == ("twemoji",)
    assert known_words.emoji_sets(model._replace(folder=None)) == twemoji.DEFAULT_SETS
    things = {"source": "twemoji_things", "folder": "x", "weight": 1.0}
    data = {
        "datasets": [things],
        "heldout": things,
        "resolution": 32,
        "vae": "",
        "text_encoder": "",
    }
    write_run_metadata(tmp_path, {"config": {"data": data}})
    sets = known_words.emoji_sets(model._replace(folder=tmp_path))
    heldout = read_prompts("heldout", emoji=sets).texts
    assert heldout == [image.caption for image in twemoji.images_of("heldout", "things")]
    assert not set(heldout) & set(read_prompts("train", emoji=sets).texts)
    assert set(heldout) & set(read_prompts("train").texts)


@pytest.mark.parametrize("count", [0, -1, 1000])
def test_as_many_heldout_images_as_there_are(count):
    model = load.load_model("instant")
    with pytest.raises(UserError, match="expected 1 to 128 held-out captions"):
        create.heldout_images(model, count)


def test_words_that_a_random_table_cannot_know():
    model = load.load_model("instant", with_params=False)
    prompts = ["Hot pepper!", "two guitars and a xylophone", "a guitar"]
    words = known_words.of_model(model)
    (note,) = known_words.notes(words, prompts)
    assert note.endswith("say nothing: guitars, xylophone")
    assert known_words.notes(None, prompts) == []
    # A pretrained encoder may know them; other data may have them.
    assert known_words.of_model(model._replace(text_encoder="minilm:tokens=16")) is None
    assert known_words.of_model(model._replace(folder=None)) is None


def test_words_that_word_vectors_make_known():
    model = load.load_model("instant", with_params=False)
    words = known_words.of_model(model._replace(text_encoder="words:tokens=12"))
    prompts = ["two guitars", "an aeroplane", "parliament of zyxwvutsrq"]
    read, unknown = known_words.notes(words, prompts)
    assert read.endswith("knows: guitars as guitar, an as a, aeroplane as airplane"), read
    assert unknown.endswith("say nothing: parliament, zyxwvutsrq")


def test_words_that_scenes_teach(monkeypatch):
    model = load.load_model("instant", with_params=False)
    model = model._replace(text_encoder="words:tokens=12")
    things = {"train": ("twemoji_things",), "heldout": ("twemoji_things",)}
    monkeypatch.setattr(known_words, "emoji_sets", lambda _: things)
    assert "wolves" in known_words.notes(known_words.of_model(model), ["two wolves"])[0]
    things["train"] += ("twemoji_scenes",)
    assert known_words.notes(known_words.of_model(model), ["two wolves", "blue cars"]) == []


def test_a_pipeline_reads_prompts_in_the_words_of_its_captions():
    model = load.load_model("instant", with_params=False)
    pipe = create.create_latent_diffusion(checkpoint="instant")
    assert not hasattr(pipe.text_encoder, "known")  # a table's words are read as they are
    width = registry.text_encoder("words:tokens=12").width
    config = dataclasses.replace(model.config, caption_channels=width)
    words = model._replace(
        config=config, text_encoder="words:tokens=12", params=pipe.params, edm=pipe.edm
    )
    encoder = create.from_model(words).text_encoder
    aeroplane, airplane = encoder.encode_text(["aeroplane", "airplane"])
    np.testing.assert_array_equal(aeroplane, airplane)
