import dataclasses

import numpy as np
import pytest

from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.encoders.tokenizers import VOCABULARY_SIZE, ClipTokenizer
from microdit_jax.errors import UserError

TABLE = TokenTable(width=256, max_tokens=24, seed=0)
RNG = np.random.default_rng(0)


def some_ids(n, length):
    return RNG.integers(1, VOCABULARY_SIZE, (n, length), dtype=np.int32)


def test_name_round_trip():
    assert TABLE.name == "table:width=256,tokens=24,seed=0"
    assert TokenTable.from_name(TABLE.name) == TABLE
    other = TokenTable(width=64, max_tokens=77, seed=123)
    assert TokenTable.from_name(other.name) == other


def test_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLE.seed = 1
    assert len({TABLE, TokenTable(256, 24, 0), TokenTable(256, 24, 1)}) == 2


def test_pinned_values():
    """The table belongs to what was trained with it, so it must never change."""
    found = TokenTable(width=4, max_tokens=4, seed=5).encode_text(["cat"])[0]
    expected = [
        [0.106039, -0.163084, 0.7569394, -0.0339587],
        [0.0551369, 0.3421518, 1.2883222, -0.6058575],
        [0.0853607, -1.671554, 0.2550196, 1.8207557],
        [0.0, 0.0, 0.0, 0.0],
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_vectors_depend_on_id_and_place_alone():
    ids = some_ids(6, 24)
    all_at_once = TABLE.encode(ids)
    np.testing.assert_array_equal(TABLE.encode(ids[4:5]), all_at_once[4:5])
    np.testing.assert_array_equal(TABLE.encode(ids[:, :10]), all_at_once[:, :10])


def test_rms_is_one_and_rows_are_independent():
    ids = np.arange(1, 4097, dtype=np.int32).reshape(-1, 16)
    vectors = TABLE.encode(ids)
    assert vectors.dtype == np.float32
    assert abs(np.sqrt(np.mean(vectors**2)) - 1) < 5e-3
    rows = (vectors - vectors.mean(axis=0)).reshape(-1, 256)  # without position
    rows /= np.sqrt(np.mean(rows**2, axis=0))
    cosine = rows @ rows.T / np.float32(256) - np.eye(len(rows), dtype=np.float32)
    assert abs(np.std(cosine) - 1 / 16) < 2e-3  # as of random directions in 256 dimensions
    assert np.abs(cosine).max() < 0.5
    correlation = rows.T @ rows / np.float32(len(rows)) - np.eye(256, dtype=np.float32)
    assert np.abs(correlation).max() < 6 / len(rows) ** 0.5


def test_seeds_give_unrelated_tables():
    ids = some_ids(8, 1)  # at place 0 the position is the same in both
    a, b = (TokenTable(256, 24, seed).encode(ids)[:, 0] for seed in (0, 1))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    assert abs(np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2))) < 0.1


def test_word_order_counts():
    found = TABLE.encode_text(["red cat", "cat red"])
    red, cat = found[0, 1], found[0, 2]
    assert np.abs(found[1, 1] - cat).max() > 0.1
    # the same word at another place stays nearer than another word
    same, other = np.linalg.norm(found[1, 2] - red), np.linalg.norm(found[1, 1] - red)
    assert same < 0.7 * other


def test_padding_is_zero_and_only_padding():
    texts = ["", "cat", "woman mechanic dark skin tone", "cat " * 40]
    vectors = TABLE.encode_text(texts)
    assert vectors.shape == (4, 24, 256)
    real = np.any(vectors != 0, axis=2)
    np.testing.assert_array_equal(real, ClipTokenizer(24)(texts) != 0)
    np.testing.assert_array_equal(real.sum(axis=1), [2, 3, 7, 24])


def test_id_zero_amid_a_text_is_a_token():
    vectors = TABLE.encode(np.array([[49406, 0, 320, 49407, 0, 0]], np.int32))
    np.testing.assert_array_equal(np.any(vectors[0] != 0, axis=1), [1, 1, 1, 1, 0, 0])
    assert not TABLE.encode(np.zeros((2, 5), np.int32)).any()


@pytest.mark.parametrize(
    "name",
    [
        "table:width=256,tokens=24",
        "table:width=256,tokens=24,seed=0,x=1",
        "table:width=-2,tokens=24,seed=0",
        "table:tokens=24,width=256,seed=0",
        "openclip:x",
        "",
    ],
)
def test_bad_name_is_a_user_error(name):
    with pytest.raises(UserError, match="expected a name like 'table:width=256,tokens=24,seed=0'"):
        TokenTable.from_name(name)


def test_bad_parameters_are_user_errors():
    with pytest.raises(UserError, match="expected an even width; found 255"):
        TokenTable.from_name("table:width=255,tokens=24,seed=0")
    with pytest.raises(UserError, match="expected tokens >= 2; found 1"):
        TokenTable(256, 1, 0)
    with pytest.raises(UserError, match="seed in .*; found 4294967296"):
        TokenTable(256, 24, 2**32)


@pytest.mark.parametrize("bad", [-1, VOCABULARY_SIZE])
def test_id_outside_the_vocabulary_is_a_user_error(bad):
    with pytest.raises(UserError, match="expected 0 to 49407; found .*use ClipTokenizer"):
        TABLE.encode(np.array([[5, bad]], np.int32))
