import dataclasses
import json
import math

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, relative_l2
from support.convert_command import run
from support.recorded import assert_same_bits, of_zeros, recorded

from microdit_jax.convert import clip_text, t5
from microdit_jax.convert.formats.safetensors_file import read_safetensors, write_safetensors
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.convert.keymap import flatten
from microdit_jax.convert.state_dict import read_state_dict
from microdit_jax.encoders.clip_text import ClipTextConfig
from microdit_jax.encoders.tokenizers import END_OF_TEXT
from microdit_jax.errors import UserError

SMALL = ClipTextConfig(width=32, layers=3, heads=4, vocab_size=128)
CLIP_KEYS = json.loads((GOLDEN / "openclip_text.json").read_text())
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 378, "layers": 32, "width": 1280},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 128,
            "width": 32,
            "heads": 4,
            "layers": 3,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]},
}
HUGGING_FACE = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 1,
    "vocab_size": 128,
}


@pytest.fixture
def tensors():
    return recorded("openclip_text_small")[0]


def with_image_tower(tensors: dict) -> dict:
    """A whole CLIP; its image tower is of NaN, so that reading it would be noticed."""
    images = {
        "visual.conv1.weight": np.full((8, 3, 2, 2), np.nan, np.float32),
        "visual.transformer.resblocks.0.ln_1.weight": np.full(8, np.nan, np.float32),
    }
    return tensors | images


# --- CLIP: names and layouts --------------------------------------------------------------------


def test_the_names_and_shapes_of_dfn5b():
    config = clip_text.infer_config(of_zeros(CLIP_KEYS), activation="quick_gelu")
    assert config == ClipTextConfig()
    table = clip_text.rename_table(config, "openclip")
    aside = {"text_projection", "logit_scale"}
    assert {e.torch_name: list(e.torch_shape) for e in table} == {
        name: shape for name, shape in CLIP_KEYS.items() if name not in aside
    }
    assert sum(math.prod(e.torch_shape) for e in table) == 352_984_064
    clip_text.from_torch(of_zeros(CLIP_KEYS), config)


@pytest.mark.parametrize(
    ("width", "layers", "activation", "padding", "total"),
    [(768, 12, "quick_gelu", END_OF_TEXT, 123_060_480), (1024, 23, "gelu", 0, 340_387_840)],
    ids=["SD1", "SD2"],
)
def test_the_names_and_shapes_of_stable_diffusion(width, layers, activation, padding, total):
    prefix, layer = "text_model.embeddings", "text_model.encoder.layers"
    shapes = {
        f"{prefix}.token_embedding.weight": (49408, width),
        f"{prefix}.position_embedding.weight": (77, width),
        "text_model.final_layer_norm.weight": (width,),
        "text_model.final_layer_norm.bias": (width,),
    }
    for i in range(layers):
        linear = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        shapes |= {f"{layer}.{i}.{n}.weight": shape for n, shape in linear.items()}
        shapes |= {f"{layer}.{i}.{n}.bias": shape[:1] for n, shape in linear.items()}
        norms = [f"{layer}.{i}.layer_norm{n}.{kind}" for n in "12" for kind in ("weight", "bias")]
        shapes |= dict.fromkeys(norms, (width,))
    tensors = of_zeros(shapes | {f"{prefix}.position_ids": (1, 77)})
    config = clip_text.infer_config(tensors, activation=activation)
    assert (config.width, config.layers, config.heads) == (width, layers, width // 64)
    assert config.padding == padding
    table = clip_text.rename_table(config, "transformers")
    assert {e.torch_name: e.torch_shape for e in table} == shapes
    assert sum(map(math.prod, shapes.values())) == total


def test_both_layouts_bit_for_bit(tensors):
    config = clip_text.infer_config(tensors, OPEN_CLIP)
    assert config == SMALL
    params = clip_text.from_torch(tensors, config)
    del tensors["text_projection"], tensors["logit_scale"]
    assert_same_bits(clip_text.to_torch(params, config), tensors)
    separate = clip_text.to_torch(params, config, layout="transformers")
    q, k, v = (separate[f"text_model.encoder.layers.1.self_attn.{n}_proj.weight"] for n in "qkv")
    fused = tensors["transformer.resblocks.1.attn.in_proj_weight"]
    np.testing.assert_array_equal(np.concatenate([q, k, v]), fused)
    for given in (separate, {n.removeprefix("text_model."): t for n, t in separate.items()}):
        again = clip_text.from_torch(given, config)
        assert_same_bits(flatten(again), flatten(params))
    assert clip_text.infer_config(separate, activation="quick_gelu", heads=4) == (
        dataclasses.replace(config, padding=END_OF_TEXT)
    )


def test_only_the_text_part_is_read(tensors):
    config = clip_text.infer_config(with_image_tower(tensors), OPEN_CLIP)
    chosen = clip_text.select(with_image_tower(tensors))
    assert chosen.notes == [
        "ignored text_projection",
        "ignored logit_scale",
        "ignored 2 tensors of visual.",
    ]
    assert clip_text.select(chosen.tensors) == (chosen.tensors, [])
    params = clip_text.from_torch(with_image_tower(tensors), config)
    assert_same_bits(flatten(params), flatten(clip_text.from_torch(tensors, config)))
    tensors["ln_final.bias"] = tensors["ln_final.bias"] * np.nan
    with pytest.raises(UserError, match=r"in 1 tensors: ln_final\.bias"):
        clip_text.from_torch(with_image_tower(tensors), config)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(tensors, dtype):
    half = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    params = clip_text.from_torch(half, SMALL)
    kernel = params["resblocks_0"]["attn_in_proj"]["kernel"]
    assert kernel.dtype == np.float32
    expected = half["transformer.resblocks.0.attn.in_proj_weight"].astype(np.float32)
    np.testing.assert_array_equal(kernel, expected.T)


def test_all_faults_at_once(tensors):
    del tensors["transformer.resblocks.1.ln_1.bias"]
    tensors["cls_emb"] = np.zeros(32, np.float32)
    tensors["transformer.resblocks.0.mlp.c_proj.weight"] = np.zeros((128, 32), np.float32)
    with pytest.raises(UserError) as caught:
        clip_text.from_torch(tensors, SMALL)
    for part in (
        "missing: transformer.resblocks.1.ln_1.bias (32,)",
        "unexpected: cls_emb (32,)",
        "mlp.c_proj.weight (expected (32, 128), found (128, 32))",
    ):
        assert part in str(caught.value)


# --- CLIP: what the tensors do not tell ---------------------------------------------------------


def test_the_activation_is_never_guessed(tensors):
    with pytest.raises(UserError, match="expected the activation .* --activation"):
        clip_text.infer_config(tensors)
    assert clip_text.infer_config(tensors, activation="gelu_tanh", heads=4).activation == (
        "gelu_tanh"
    )
    for config, found in (
        (OPEN_CLIP, "quick_gelu"),
        ({"model_cfg": {"text_cfg": {"heads": 4}}}, "gelu"),
        ({"model_cfg": {"text_cfg": {"heads": 4, "act_kwargs": {"approximate": "tanh"}}}},
         "gelu_tanh"),
        (HUGGING_FACE, "gelu"),
        (HUGGING_FACE | {"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"text_config": HUGGING_FACE, "model_type": "clip"}, "gelu"),
        (dataclasses.asdict(SMALL), "quick_gelu"),
    ):  # fmt: skip
        read = clip_text.infer_config(tensors, config)
        assert read == dataclasses.replace(SMALL, activation=found)


def test_norm_eps_is_read():
    tensors, _ = recorded("openclip_text_small")
    text = OPEN_CLIP["model_cfg"]["text_cfg"] | {"norm_kwargs": {"eps": 1e-6}}
    assert clip_text.infer_config(tensors, {"model_cfg": {"text_cfg": text}}).norm_eps == 1e-6
    config = HUGGING_FACE | {"layer_norm_eps": 1e-7}
    assert clip_text.infer_config(tensors, config).norm_eps == 1e-7


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            None,
            {"activation": "gelu"},
            "multiple of 64, found 32; convert it first: .* --heads",
        ),
        (None, {"activation": "relu", "heads": 4}, "activation must be one of"),
        (OPEN_CLIP, {"activation": "gelu"}, r"activation quick_gelu \(asked for is gelu\)"),
        (HUGGING_FACE | {"hidden_size": 64}, {}, r"hidden_size 64 \(the tensors have 32\)"),
        (HUGGING_FACE | {"hidden_act": "relu"}, {}, "expected hidden_act .*found hidden_act relu"),
        ({"model_cfg": {"text_cfg": {"no_causal_mask": True}}}, {}, "causal .*no_causal_mask"),
        ({"model_cfg": {"text_cfg": {"hf_model_name": "x"}}}, {}, "found hf_model_name x"),
        ({"latent_channels": 4}, {}, "found latent_channels; give the text tower's own config"),
    ],
)
def test_configs_that_do_not_fit(tensors, config, options, message):
    with pytest.raises(UserError, match=message):
        clip_text.infer_config(tensors, config, **options)


def test_what_is_not_a_clip():
    t5_tensors, _ = recorded("t5_small")
    with pytest.raises(UserError, match="found neither among 31 tensors .*name its kind"):
        clip_text.infer_config(t5_tensors, activation="gelu")
    with pytest.raises(UserError, match=r"sizes, found .*positional_embedding \(missing\)"):
        clip_text.infer_config({"token_embedding.weight": np.zeros((3, 2))}, activation="gelu")
    with pytest.raises(UserError, match="found widht; correct"):
        clip_text.config_from_dict({"widht": 3})


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["whole", "custom text"])
def test_clip_by_command(tmp_path, tensors, layout, capsys):
    _, others = recorded("openclip_text_small")
    whole = with_image_tower(tensors)
    if layout == "custom text":
        whole = {
            name if name.startswith(("visual", "logit_scale")) else f"text.{name}": tensor
            for name, tensor in whole.items()
        }
    file, model = tmp_path / "open_clip_pytorch_model.bin", tmp_path / "model"
    write_torch(file, whole)
    assert len(read_state_dict(file).tensors) == len(whole)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    run("--kind=clip_text", f"--input={file}", f"--output={model}")
    report = capsys.readouterr().out
    assert "3 blocks of width 32, 4 heads, quick_gelu, 77 tokens padded with 0" in report
    assert "ignored 2 tensors of visual." in report and "text_projection" in report
    encoder = clip_text.load_encoder(model, "tower", batch=3)
    assert encoder.name == "tower"
    assert relative_l2(encoder.encode(others["tokens"]), others["hidden"][:, 0]) < 2e-5
    back = tmp_path / "back.safetensors"
    run("--kind=clip_text", "--to=torch", f"--input={model}", f"--output={back}")
    del tensors["text_projection"], tensors["logit_scale"]
    assert_same_bits(read_safetensors(back)[0], tensors)


def test_clip_without_a_config_by_command(tmp_path, tensors, capsys):
    file, model = tmp_path / "clip.safetensors", tmp_path / "model"
    write_safetensors(file, tensors)
    with pytest.raises(UserError, match="--activation"):
        run("--kind=clip_text", f"--input={file}", f"--output={model}")
    assert not model.exists()
    run(
        "--kind=clip_text", f"--input={file}", f"--output={model}", "--activation=gelu", "--heads=4"
    )
    config = clip_text.load_encoder(model).config
    assert config == dataclasses.replace(SMALL, activation="gelu")
    with pytest.raises(UserError, match="expected a model of kind t5"):
        t5.load_encoder(model)
