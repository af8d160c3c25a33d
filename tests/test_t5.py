import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from conftest import GOLDEN, relative_l2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers import T5Tokenizer as HfTokenizer

from microdit_jax.convert.t5 import from_torch, infer_config
from microdit_jax.encoders.t5 import T5, T5Config, T5Encoder, T5Tokenizer, relative_buckets
from microdit_jax.errors import UserError

TINY = T5Config(width=8, layers=1, heads=2, head_dim=3, ffn=12, vocab_size=20, max_tokens=9)


@pytest.fixture(scope="module")
def golden():
    """The recorded encoder: its arrays, config and parameters."""
    with np.load(GOLDEN / "t5_small.npz") as file:
        arrays = {key: file[key] for key in file.files}
    prefix = "state_dict/"
    tensors = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    config = infer_config(tensors, json.loads(str(arrays["config"])))
    return arrays, config, from_torch(tensors, config)


@pytest.fixture(scope="module")
def tiny():
    ids = jnp.zeros((1, 4), jnp.int32)
    return jax.jit(T5(TINY).init)(jax.random.key(0), ids, ids == 0)["params"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """T5's tokenizer with a vocabulary of its markers, letters and two words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(letter, -5.0) for letter in "abcdeghot"] + [("▁cat", -1.0), ("▁a", -1.0)]
    folder = tmp_path_factory.mktemp("tokenizer")
    HfTokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    return str(folder)


def test_golden_with_padding(golden):
    arrays, config, params = golden
    encoder = T5Encoder("golden", config, params)
    found = encoder.encode(arrays["tokens"], arrays["attention_mask"])
    assert found.dtype == np.float32
    assert relative_l2(found, arrays["hidden"]) < 2e-5
    np.testing.assert_array_equal(encoder.encode(arrays["tokens"]), found)  # padding is id 0
    unmasked = encoder.encode(arrays["tokens"], np.ones_like(arrays["tokens"]))
    assert relative_l2(unmasked[:1], arrays["hidden"][:1]) > 1e-2
    np.testing.assert_array_equal(unmasked[1:], found[1:])


def test_bfloat16_is_near(golden):
    arrays, config, params = golden
    config = dataclasses.replace(config, dtype="bfloat16")
    found = T5Encoder("", config, params).encode(arrays["tokens"])
    assert 1e-5 < relative_l2(found, arrays["hidden"]) < 5e-2


def test_captions_are_cut_as_in_the_reference():
    assert T5Config().max_tokens == 120


def test_relative_buckets():
    table = relative_buckets(200, 32, 128)
    assert table.shape == (200, 200) and table.dtype == np.int32
    first = {}  # the least distance of every bucket, as PyTorch's float32 gives it
    for distance, bucket in enumerate(table[:, 0]):
        first.setdefault(int(bucket), distance)
    assert first == dict(enumerate([*range(9), 12, 16, 23, 32, 46, 64, 91]))
    # A key after the query: the same, in the other half.
    np.testing.assert_array_equal(table[0, 1:], 16 + table[1:, 0])
    i, j = np.indices((60, 60))
    np.testing.assert_array_equal(table[:60, :60], table[100 + i - j, 100])


def test_padding_is_seen_by_nobody(tiny):
    encoder = T5Encoder("", TINY, tiny)
    ids = np.array([[3, 4, 5, 0, 0, 0]], np.int32)
    found = encoder.encode(ids)
    np.testing.assert_allclose(found[:, :3], encoder.encode(ids[:, :3]), rtol=1e-5, atol=1e-6)
    # The mask rules, not the id.
    other = encoder.encode(np.array([[3, 4, 5, 9, 9, 9]], np.int32), np.array([[1, 1, 1, 0, 0, 0]]))
    np.testing.assert_array_equal(found[:, :3], other[:, :3])
    assert np.isfinite(encoder.encode(np.zeros((1, 6), np.int32))).all()  # nothing but padding


def test_batches_do_not_matter_and_compile_once(tiny):
    ids = np.random.default_rng(1).integers(1, 20, (5, 7), dtype=np.int32)
    encoder = T5Encoder("", TINY, tiny, batch=2)
    all_at_once = encoder.encode(ids)
    for i, row in enumerate(ids):
        np.testing.assert_array_equal(encoder.encode(row[None])[0], all_at_once[i])
    assert encoder.encode(ids[:0]).shape == (0, 7, 8)
    assert encoder._apply._cache_size() == 1


def test_tokenizer(tokenizer_folder):
    tokenizer = T5Tokenizer(tokenizer_folder, max_tokens=6)
    texts = ["a cat", "", "cat " * 9]
    ids, mask = tokenizer.with_mask(texts)
    np.testing.assert_array_equal(tokenizer(texts), ids)
    a, cat = 14, 13
    expected = [[a, cat, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [cat] * 5 + [1]]
    np.testing.assert_array_equal(ids, expected)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(mask, ids != 0)
    np.testing.assert_array_equal(tokenizer.dropped(texts), [0, 0, 4])
    assert tokenizer([]).shape == (0, 6) and tokenizer.dropped([]).shape == (0,)


def test_a_sentencepiece_vocabulary(tmp_path):
    """As DeepFloyd/t5-v1_1-xxl has it: spiece.model, and no tokenizer.json."""
    texts = ["an apple a day", "the dog sat on the mat", "the sun and the moon"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20), model_prefix=str(tmp_path / "spiece"), vocab_size=60,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    about = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
    about |= {"unk_token": "<unk>", "extra_ids": 0, "additional_special_tokens": []}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    ids, mask = T5Tokenizer(str(tmp_path), max_tokens=40).with_mask(texts[:2])
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    for row, kept, expected in zip(ids, mask, pieces.encode(texts[:2]), strict=True):
        np.testing.assert_array_equal(row[kept], [*expected, 1])


def test_text_to_vectors(tiny, tokenizer_folder):
    tokenizer = T5Tokenizer(tokenizer_folder, TINY.max_tokens)
    encoder = T5Encoder("tower", TINY, tiny, tokenizer)
    vectors = encoder.encode_text(["a cat", "cat"])
    assert vectors.shape == (2, encoder.max_tokens, encoder.width) == (2, 9, 8)
    np.testing.assert_array_equal(vectors, encoder.encode(*tokenizer.with_mask(["a cat", "cat"])))
    with pytest.raises(UserError, match="tokenizer with tower, found none; put spiece.model"):
        T5Encoder("tower", TINY, tiny).encode_text(["cat"])


def test_bad_input(tiny, tokenizer_folder, tmp_path, monkeypatch):
    encoder = T5Encoder("tower", TINY, tiny)
    with pytest.raises(UserError, match="tower: expected token ids 0 to 19, found 5 to 20"):
        encoder.encode(np.array([[5, 20]], np.int32))
    with pytest.raises(UserError, match=r"expected the shape \(1, 2\) of the ids, found \(2,\)"):
        encoder.encode(np.array([[5, 6]], np.int32), np.array([1, 1]))
    tokenizer = T5Tokenizer(tokenizer_folder)
    with pytest.raises(UserError, match="expected a list of strings; found str"):
        tokenizer("a cat")
    with pytest.raises(UserError, match="found bytes at index 1"):
        tokenizer(["a", b"cat"])
    with pytest.raises(UserError, match="expected a T5 tokenizer .*give its folder"):
        T5Tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(UserError, match="expected T5's vocabulary .*found none; fetch the folder"):
        T5Tokenizer(str(tmp_path))
    other = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1, "</s>": 2}, unk_token="a"))
    other = PreTrainedTokenizerFast(tokenizer_object=other, pad_token="<pad>", eos_token="</s>")
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expected T5's padding 0 and end marker 1 .*found 1 and 2"):
        T5Tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, r"dtype of T5 must be float32 or bfloat16 \(it overflows"),
        ({"param_dtype": "float16"}, "param_dtype of T5 must be float32"),
        ({"buckets": 6}, "buckets in a multiple of 4 .*found 6 and 128"),
        ({"max_distance": 8}, "max_distance above a quarter of them, found 32 and 8"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **changes)


def test_no_code_of_a_tokenizers_folder_is_run_nor_asked_for(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizer\n"
        "class Evil(PreTrainedTokenizer):\n    pass\n"
    )
    about = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    with pytest.raises(UserError, match="expected a T5 tokenizer .*give its folder") as error:
        T5Tokenizer(str(tmp_path))
    assert not asked and not ran.exists() and str(error.value).isprintable()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model": {"type": "Unigram", "vocab": 3}}', "{"])
def test_a_damaged_tokenizer_is_one_line(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(UserError, match="expected a T5 tokenizer .*give its folder"):
        T5Tokenizer(str(tmp_path))
