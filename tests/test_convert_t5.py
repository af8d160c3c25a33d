import dataclasses
import json
import math

import numpy as np
import pytest
from conftest import relative_l2
from support.convert_command import run
from support.recorded import assert_same_bits, of_zeros, recorded

from microdit_jax.convert import clip_text, t5
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.keymap import flatten
from microdit_jax.encoders.t5 import T5Config
from microdit_jax.errors import UserError


@pytest.fixture
def t5_tensors():
    return recorded("t5_small")[0]


def test_t5_bit_for_bit(t5_tensors):
    _, others = recorded("t5_small")
    given = json.loads(str(others["config"]))
    config = t5.infer_config(t5_tensors, given)
    assert config == T5Config(
        width=32, layers=3, heads=4, head_dim=8, ffn=48, vocab_size=96
    ) == t5.infer_config(t5_tensors, dataclasses.asdict(config))  # fmt: skip
    assert t5.infer_config(t5_tensors, t5.config_json(config)) == config
    assert t5.infer_config(t5_tensors, max_tokens=40).max_tokens == 40
    params = t5.from_torch(t5_tensors, config)
    tied = t5_tensors.pop("encoder.embed_tokens.weight")
    assert_same_bits(t5.to_torch(params, config), t5_tensors)
    # Only under its other name, and with a decoder beside it.
    table = t5_tensors.pop("shared.weight")
    decoder = np.full(3, np.nan, np.float32)
    whole = t5_tensors | {"encoder.embed_tokens.weight": tied, "decoder.block.0.x": decoder}
    assert t5.select(whole).notes == ["ignored 1 tensors of decoder."]
    assert_same_bits(flatten(t5.from_torch(whole, config)), flatten(params))
    assert t5.infer_config(whole) == config
    with pytest.raises(UserError, match="found two that differ"):
        t5.from_torch(whole | {"shared.weight": table + 1}, config)


def test_the_names_and_shapes_of_xxl():
    block, attention = "encoder.block", "layer.0.SelfAttention"
    shapes = {
        "shared.weight": (32128, 4096),
        f"{block}.0.{attention}.relative_attention_bias.weight": (32, 64),
        "encoder.final_layer_norm.weight": (4096,),
    }
    for i in range(24):
        shapes |= {f"{block}.{i}.{attention}.{name}.weight": (4096, 4096) for name in "qkvo"}
        shapes |= {f"{block}.{i}.layer.{n}.layer_norm.weight": (4096,) for n in (0, 1)}
        ffn = f"{block}.{i}.layer.1.DenseReluDense"
        shapes |= {f"{ffn}.wi_{n}.weight": (10240, 4096) for n in (0, 1)}
        shapes[f"{ffn}.wo.weight"] = (4096, 10240)
    config = t5.infer_config(of_zeros(shapes))
    assert config == T5Config()
    assert {e.torch_name: e.torch_shape for e in t5.rename_table(config)} == shapes
    assert sum(map(math.prod, shapes.values())) == 4_762_310_656


GATED = {"feed_forward_proj": "gated-gelu"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GATED | {"d_model": 64, "num_heads": 8},
            r"d_model 64 \(the tensors have 32\); num_heads 8",
        ),
        (
            {"feed_forward_proj": "relu"},
            "expected feed_forward_proj as 'gated-gelu' .* found .* relu",
        ),
        (
            {"d_model": 32},
            "expected feed_forward_proj as 'gated-gelu' .* found feed_forward_proj none",
        ),
        (GATED | {"layer_norm_epsilon": -1}, "layer_norm_epsilon of T5Config as positive float"),
        ({"model_type": "umt5"}, "model_type umt5"),
    ],
)
def test_t5_configs_that_do_not_fit(t5_tensors, config, message):
    with pytest.raises(UserError, match=message):
        t5.infer_config(t5_tensors, config)


def test_what_is_not_t5(t5_tensors):
    tensors, _ = recorded("openclip_text_small")
    with pytest.raises(UserError, match=r"shared\.weight \(missing\).*name its kind"):
        t5.infer_config(tensors)
    with pytest.raises(UserError, match="expected T5 v1.1 .*found the original T5"):
        t5.infer_config({"encoder.block.0.layer.1.DenseReluDense.wi.weight": np.zeros((2, 2))})
    config = t5.infer_config(t5_tensors)
    del t5_tensors["encoder.block.2.layer.1.layer_norm.weight"]
    with pytest.raises(UserError, match=r"missing: encoder\.block\.2\.layer\.1\.layer_norm"):
        t5.from_torch(t5_tensors, config)
    with pytest.raises(UserError, match="found widht; correct"):
        t5.config_from_dict({"widht": 3})


def test_t5_by_command(tmp_path, t5_tensors, capsys):
    _, others = recorded("t5_small")
    folder, model = tmp_path / "text_encoder", tmp_path / "model"
    folder.mkdir()
    names = sorted(t5_tensors)  # in two shards, as the released encoder is
    shards = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for shard, held in shards.items():
        write_safetensors(folder / shard, {name: t5_tensors[name] for name in held})
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(str(others["config"]))
    run("--kind=t5", f"--input={tmp_path}", f"--output={model}", "--max_tokens=40")
    told = capsys.readouterr().out
    assert "3 blocks of width 32, 4 heads of 8" in told and "no tokenizer in" in told
    # Its tokenizer comes along, also when it was put there later.
    (folder / "spiece.model").write_bytes(b"pieces")
    run("--kind=t5", f"--input={tmp_path}", f"--output={model}", "--max_tokens=40")
    assert "nothing to do" in capsys.readouterr().out
    assert (model / "tokenizer" / "spiece.model").read_bytes() == b"pieces"
    encoder = t5.load_encoder(model)
    found = encoder.encode(others["tokens"], others["attention_mask"])
    assert encoder.max_tokens == 40 and relative_l2(found, others["hidden"]) < 2e-5
    with pytest.raises(UserError, match="expected a model of kind clip_text"):
        clip_text.load_encoder(model)
