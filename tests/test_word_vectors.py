import dataclasses

import numpy as np
import pytest

from microdit_jax.assets import hub, load
from microdit_jax.data import twemoji
from microdit_jax.encoders import registry, word_vectors
from microdit_jax.encoders.word_vectors import NearWords, WordTokenizer, WordVectors
from microdit_jax.errors import UserError
from microdit_jax.towers import TextEncoder

ENCODER = WordVectors(max_tokens=8)


def words_of(text, max_tokens=8):
    return [word_vectors.table().words[i] for i in WordTokenizer(max_tokens)([text])[0] if i]


def similarity(first, second):
    a, b = (
        ENCODER.encode_text([word])[0, 0, : -word_vectors.POSITIONS] for word in (first, second)
    )
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_name_round_trip():
    assert ENCODER.name == "words:tokens=8" and WordVectors.from_name(ENCODER.name) == ENCODER
    assert registry.text_encoder(ENCODER.name) == ENCODER
    assert load.load_text_encoder(ENCODER.name) == ENCODER
    assert hub.is_known(ENCODER.name)
    assert isinstance(ENCODER, TextEncoder)


@pytest.mark.parametrize("name", ["words:", "words:tokens=0", "words:tokens=513", "words:width=3"])
def test_names_of_no_encoder(name):
    with pytest.raises(UserError, match="expected"):
        registry.text_encoder(name)


def test_synonyms_are_near_and_other_words_are_not():
    for word, synonym, other in (
        ("airplane", "aeroplane", "apple"),
        ("dog", "puppy", "rocket"),
        ("fire", "flame", "guitar"),
        ("taxi", "cab", "mushroom"),
    ):
        assert similarity(word, synonym) > similarity(word, other) + 0.2


def test_words_pieces_and_what_is_left_out():
    assert words_of("Hot PEPPER!") == ["hot", "pepper"]
    assert words_of("woman’s jack-o-lantern, piñata") == ["woman's", "jack-o-lantern", "pinata"]
    assert words_of("dog-rocket") == ["dog", "rocket"]
    pieces = words_of("zyxwvutsrq")
    assert len(pieces) > 1 and all(piece.startswith("##") for piece in pieces[1:])
    assert "".join(piece.removeprefix("##") for piece in pieces) == "zyxwvutsrq"
    assert words_of("helicopterzz")[0] == "helicopter"
    assert words_of("") == words_of("日本 ! #") == []


def test_long_texts_are_cut_and_counted():
    text = "one two three four five six seven eight nine ten"
    assert words_of(text) == text.split()[:8]
    assert WordTokenizer(8).dropped([text, "one", ""]).tolist() == [2, 0, 0]
    with pytest.raises(UserError, match="list of strings"):
        WordTokenizer(8)("one")


def test_every_caption_is_made_of_whole_words_and_fits():
    captions = [image.caption for image in twemoji.list_images()]
    words = {word for caption in captions for word in caption.split()}
    assert not [word for word in words if not word_vectors.knows(word)]
    assert not WordTokenizer(12).dropped(captions).any()


def test_vectors_have_one_size_and_padding_none():
    vectors = ENCODER.encode_text(["a red apple", ""])
    assert vectors.shape == (2, 8, ENCODER.width) and vectors.dtype == np.float32
    rms = np.sqrt(np.mean(vectors[0, :3] ** 2, axis=1))
    np.testing.assert_allclose(rms, 1, atol=0.08)
    assert not vectors[0, 3:].any() and not vectors[1].any()


def test_position_is_apart_from_meaning():
    first, last = ENCODER.encode_text(["dog cat", "cat dog"])
    meaning = slice(-word_vectors.POSITIONS)
    np.testing.assert_array_equal(first[0, meaning], last[1, meaning])
    assert np.abs(first[0] - last[1]).max() > 0.3


def test_ids_outside_of_the_table():
    size = len(word_vectors.table().words)
    for ids in ([[size]], [[-1]]):
        with pytest.raises(UserError, match=f"expected 0 to {size - 1}"):
            ENCODER.encode(np.array(ids, np.int32))


def test_a_damaged_file_is_told(monkeypatch, tmp_path):
    (tmp_path / "words.npz").write_bytes(b"no zip")
    monkeypatch.setattr(word_vectors, "FILE", tmp_path / "words.npz")
    with pytest.raises(UserError, match="install microdit_jax again"):
        word_vectors.table.__wrapped__()


def test_words_near_those_of_training():
    known = NearWords(["airplane", "dog", "Woman’s"])
    assert all(word in known for word in ("dog", "aeroplane", "puppy", "woman's"))
    assert not any(word in known for word in ("parliament", "zyxwvutsrq", ""))


def test_a_prompt_is_read_in_the_words_that_a_network_knows():
    known = NearWords(["airplane", "dog", "woman's", "dogs"])
    assert known.nearest("aeroplane") == "airplane" and known.nearest("puppy") == "dog"
    assert known.nearest("Woman’s") == "woman's" and known.nearest("dogs") == "dogs"
    assert known.nearest("parliament") is None and NearWords([]).nearest("puppy") is None
    reading = dataclasses.replace(ENCODER, known=known)
    texts = ["aeroplane parliament zyxwvutsrq puppy"]
    plain = ENCODER.encode_text(["airplane parliament zyxwvutsrq dog"])
    np.testing.assert_array_equal(reading.encode_text(texts), plain)
    assert np.abs(ENCODER.encode_text(texts) - plain).max() > 0.3
    assert (
        reading.tokenizer.dropped(texts * 2).tolist()
        == ENCODER.tokenizer.dropped(texts * 2).tolist()
    )
    assert reading.name == ENCODER.name and reading.width == ENCODER.width
