import dataclasses
import json

import numpy as np
import pytest
from conftest import relative_l2
from support.convert_command import run
from support.recorded import assert_same_bits, recorded

from microdit_jax.convert import bert
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.keymap import flatten
from microdit_jax.encoders.bert import BertConfig
from microdit_jax.errors import UserError


@pytest.fixture
def tensors():
    return recorded("bert_small")[0]


@pytest.fixture
def config_json():
    return json.loads(str(recorded("bert_small")[1]["config"]))


def test_bit_for_bit(tensors, config_json):
    config = bert.infer_config(tensors, config_json)
    assert config == BertConfig(
        width=32, layers=2, heads=4, ffn=48, vocab_size=64, positions=20, max_tokens=20
    ) == bert.infer_config(tensors, dataclasses.asdict(config))  # fmt: skip
    assert bert.infer_config(tensors, bert.config_json(config)) == config
    assert bert.infer_config(tensors, config_json, max_tokens=7).max_tokens == 7
    params = bert.from_torch(tensors, config)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    assert len(kept) == len(tensors) - 2
    assert_same_bits(bert.to_torch(params, config), kept)
    # Inside a model with a head, as BertForMaskedLM is saved.
    whole = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    whole |= {
        "cls.predictions.bias": np.full(3, np.nan),
        "bert.embeddings.position_ids": np.ones(3),
    }
    notes = [
        f"ignored {n}."
        for n in ("2 tensors of pooler", "1 tensors of cls", "1 tensors of position_ids")
    ]
    assert bert.select(whole).notes == notes
    assert_same_bits(flatten(bert.from_torch(whole, config)), flatten(params))


def test_the_real_ones_names_and_shapes():
    table = bert.rename_table(BertConfig())
    shapes = {entry.torch_name: entry.torch_shape for entry in table}
    layer = "encoder.layer.5"
    assert len(shapes) == 5 + 6 * 16
    assert shapes["embeddings.word_embeddings.weight"] == (30522, 384)
    assert shapes["embeddings.position_embeddings.weight"] == (512, 384)
    assert shapes[f"{layer}.intermediate.dense.weight"] == (1536, 384)
    assert shapes[f"{layer}.attention.output.LayerNorm.bias"] == (384,)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 22_565_376


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, r"hidden_size 64 \(the tensors have 32\)"),
        ({"position_embedding_type": "relative_key"}, "expected position_embedding_type as 'absol"),
        ({"model_type": "roberta"}, "model_type roberta; this BERT is not supported"),
        ({"hidden_act": "relu"}, "expected hidden_act of quick_gelu, .* found hidden_act relu"),
        ({"layer_norm_eps": -1}, "layer_norm_eps of BertConfig as positive float"),
        ({"num_attention_heads": 5}, "heads that divide the width 32, found 5"),
        ({"rope_theta": 1e4}, "expected rope_theta left out"),
    ],
)
def test_configs_that_do_not_fit(tensors, config_json, change, message):
    with pytest.raises(UserError, match=message):
        bert.infer_config(tensors, config_json | change)


def test_what_is_not_a_bert(tensors, config_json):
    with pytest.raises(UserError, match="expected a BERT's config.json beside its weights"):
        bert.infer_config(tensors)
    with pytest.raises(UserError, match=r"word_embeddings\.weight \(missing\).*name its kind"):
        bert.infer_config(recorded("t5_small")[0], config_json)
    config = bert.infer_config(tensors, config_json)
    del tensors["encoder.layer.1.output.LayerNorm.bias"]
    with pytest.raises(UserError, match=r"missing: encoder\.layer\.1\.output\.LayerNorm\.bias"):
        bert.from_torch(tensors, config)
    with pytest.raises(UserError, match="found widht; correct"):
        bert.config_from_dict({"widht": 3})


def test_by_command_there_and_back(tmp_path, tensors, config_json, capsys):
    _, others = recorded("bert_small")
    folder, model, back = tmp_path / "minilm", tmp_path / "model", tmp_path / "back.safetensors"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config_json))
    (folder / "tokenizer.json").write_text("{}")
    run("--kind=bert", f"--input={folder}", f"--output={model}", "--max_tokens=9")
    told = capsys.readouterr().out
    assert "2 layers of width 32, 4 heads, feed-forward 48, gelu, 9 tokens" in told
    assert (model / "tokenizer" / "tokenizer.json").read_text() == "{}"
    encoder = bert.load_encoder(model)
    mask = others["attention_mask"] != 0
    found = encoder.encode(others["tokens"], mask)
    assert encoder.max_tokens == 9 and relative_l2(found[mask], others["hidden"][mask]) < 2e-5
    run("--kind=bert", "--to=torch", f"--input={model}", f"--output={back}")
    run("--kind=bert", f"--input={back}", f"--output={tmp_path / 'again'}", "--max_tokens=9")
    again = bert.load_encoder(tmp_path / "again")
    assert again.config == encoder.config
    assert_same_bits(flatten(again.params), flatten(encoder.params))
