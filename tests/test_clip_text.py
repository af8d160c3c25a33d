import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, relative_l2

from microdit_jax.convert.clip_text import from_torch
from microdit_jax.encoders.clip_block import ACTIVATIONS
from microdit_jax.encoders.clip_text import ClipText, ClipTextConfig, ClipTextEncoder
from microdit_jax.encoders.known_texts import KnownTexts
from microdit_jax.encoders.tokenizers import END_OF_TEXT, START_OF_TEXT
from microdit_jax.errors import UserError

TINY = ClipTextConfig(width=8, layers=1, heads=2, activation="gelu", ffn=12)


def load(name: str):
    """A recorded tower: its arrays, config and parameters."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    sizes = json.loads(str(arrays["config"]))
    config = ClipTextConfig(activation="quick_gelu" if sizes.pop("quick_gelu") else "gelu", **sizes)
    prefix = "state_dict/"
    tensors = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return arrays, config, from_torch(tensors, config)


@pytest.fixture(scope="module")
def tiny():
    init = jax.jit(ClipText(TINY).init)
    return init(jax.random.key(0), jnp.zeros((1, TINY.context_length), jnp.int32))["params"]


@pytest.mark.parametrize("name", ["openclip_text_small", "openclip_text_small_gelu"])
def test_golden(name):
    arrays, config, params = load(name)
    encoder = ClipTextEncoder("golden", config, params)
    found = encoder.encode(arrays["tokens"])
    assert found.dtype == np.float32
    assert relative_l2(found, arrays["hidden"][:, 0]) < 2e-5
    # The activation is seen: with the other one the result is another.
    other = {"quick_gelu": "gelu", "gelu": "quick_gelu"}[config.activation]
    other = ClipTextEncoder("", dataclasses.replace(config, activation=other), params)
    assert relative_l2(other.encode(arrays["tokens"]), arrays["hidden"][:, 0]) > 1e-3


def test_bfloat16_is_near():
    arrays, config, params = load("openclip_text_small")
    config = dataclasses.replace(config, dtype="bfloat16")
    found = ClipTextEncoder("", config, params).encode(arrays["tokens"])
    assert 1e-5 < relative_l2(found, arrays["hidden"][:, 0]) < 2e-2


def test_activations_at_known_points():
    # x sigmoid(1.702 x), x Phi(x) and its tanh form, by hand at x = 1
    expected = {"quick_gelu": 0.8457958, "gelu": 0.8413447, "gelu_tanh": 0.8411920}
    for name, value in expected.items():
        assert abs(float(ACTIVATIONS[name](jnp.float32(1))) - value) < 1e-6


def test_a_token_sees_only_what_is_before(tiny):
    encoder = ClipTextEncoder("", TINY, tiny)
    ids = np.random.default_rng(0).integers(1, TINY.vocab_size, (1, 10), dtype=np.int32)
    changed = ids.copy()
    changed[0, 6] += 1
    a, b = encoder.encode(ids)[0], encoder.encode(changed)[0]
    np.testing.assert_array_equal(a[:6], b[:6])
    assert (np.abs(a[6:] - b[6:]).max(axis=1) > 1e-4).all()


def test_batches_do_not_matter_and_compile_once(tiny):
    ids = np.random.default_rng(1).integers(0, TINY.vocab_size, (7, 9), dtype=np.int32)
    encoder = ClipTextEncoder("", TINY, tiny, batch=3)
    all_at_once = encoder.encode(ids)
    for i, row in enumerate(ids):
        np.testing.assert_array_equal(encoder.encode(row[None])[0], all_at_once[i])
    assert encoder.encode(ids[:0]).shape == (0, 9, 8)
    assert encoder._apply._cache_size() == 1


def test_text_to_vectors(tiny):
    encoder = ClipTextEncoder("tower", TINY, tiny)
    texts = ["", "a cat", "cat " * 90]
    vectors = encoder.encode_text(texts)
    assert vectors.shape == (3, encoder.max_tokens, encoder.width) == (3, 77, 8)
    assert encoder.name == "tower"
    ids = encoder.tokenizer(texts)
    np.testing.assert_array_equal(vectors, encoder.encode(ids))
    np.testing.assert_array_equal(ids[0, :4], [START_OF_TEXT, END_OF_TEXT, 0, 0])
    assert ids[2, -1] == END_OF_TEXT and encoder.tokenizer.dropped(texts).tolist() == [0, 0, 15]
    sd1 = ClipTextEncoder("", dataclasses.replace(TINY, padding=END_OF_TEXT), tiny)
    np.testing.assert_array_equal(sd1.tokenizer([""])[0], [START_OF_TEXT] + [END_OF_TEXT] * 76)
    assert np.abs(sd1.encode_text([""])[0, 2:] - vectors[0, 2:]).max() > 1e-3


def test_a_mask_makes_no_difference(tiny):
    encoder = ClipTextEncoder("", TINY, tiny)
    ids = encoder.tokenizer(["a cat"])
    mask = (ids != 0).astype(np.int32)
    np.testing.assert_array_equal(encoder.encode(ids, mask), encoder.encode(ids))


def test_a_copy_on_another_device(tiny):
    encoder, device = ClipTextEncoder("", TINY, tiny), jax.devices()[3]
    copied = encoder.with_sharding(jax.sharding.SingleDeviceSharding(device))
    assert jax.tree.leaves(copied.params)[0].devices() == {device}
    assert copied.network.params is copied.params and encoder.params is tiny
    np.testing.assert_array_equal(copied.encode_text(["a"]), encoder.encode_text(["a"]))


def test_known_texts_give_their_own_embeddings(tiny):
    encoder = ClipTextEncoder("tower", TINY, tiny)
    known = KnownTexts(encoder, ["cat", "a", "cat", "b"])
    np.testing.assert_array_equal(
        known.encode_text(["b", "cat"]), encoder.encode_text(["b", "cat"])
    )
    assert (known.name, known.width, known.max_tokens, known.pretrained) == ("tower", 8, 77, True)
    with pytest.raises(KeyError):
        known.encode_text(["dog"])
    with pytest.raises(ValueError, match="found token ids"):
        known.encode(np.zeros((1, 77), np.int32))


def test_bad_ids(tiny):
    encoder = ClipTextEncoder("tower", TINY, tiny)
    with pytest.raises(UserError, match="tower: expected at most 77 tokens, found 78"):
        encoder.encode(np.zeros((1, 78), np.int32))
    for bad in (-1, TINY.vocab_size):
        with pytest.raises(UserError, match="expected token ids 0 to 49407, found .*own tokenizer"):
            encoder.encode(np.array([[5, bad]], np.int32))
    with pytest.raises(UserError, match="expected a list of strings"):
        encoder.encode_text("a cat")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation must be one of quick_gelu, gelu, gelu_tanh, found"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"heads": 3}, "heads that divide the width 8, found 3"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **changes)
