"""Every key of an open_clip_config.json is used, known to be without effect, or refused by name."""

import numpy as np
import pytest
from conftest import GOLDEN
from support.small_clip import openclip_config, small_config, small_tensors

from microdit_jax.convert import clip, clip_text
from microdit_jax.convert.openclip_config import MODEL, PREPARE, TEXT, VISION
from microdit_jax.errors import UserError

PARTS = {keys.part: keys for keys in (MODEL, VISION, TEXT, PREPARE)}


@pytest.fixture
def config():
    with np.load(GOLDEN / "clip_small.npz") as golden:
        return openclip_config(golden, "gelu")


def changed(config: dict, part: str, **keys) -> dict:
    """The config with other keys in one of its parts."""
    inside = config if part in ("preprocess_cfg", "model_cfg") else config["model_cfg"]
    inside[part] = {**inside.get(part, {}), **keys}
    return config


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision_cfg", "pool_type", "avg"),
        ("text_cfg", "pool_type", "last"),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "ls_init_value", 0.1),
        ("vision_cfg", "qk_norm", True),
        ("vision_cfg", "act_kwargs", {"approximate": "other"}),
        ("vision_cfg", "act_kwargs", {"inplace": True}),
        ("vision_cfg", "norm_kwargs", {"elementwise_affine": False}),
        ("vision_cfg", "head_width", 0),
        ("vision_cfg", "head_width", "8"),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "hf_tokenizer_name", "bert-base-uncased"),
        ("text_cfg", "act_kwargs", {"approximate": 3}),
        ("model_cfg", "multimodal_cfg", {"width": 3}),
        ("model_cfg", "quick_gelu", "yes"),
        ("preprocess_cfg", "interpolation", "bilinear"),
        ("preprocess_cfg", "size", 336),
        *((part, "from_the_future", 1) for part in PARTS),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, part, key, value):
    with pytest.raises(UserError, match=f"expected {key} .* in {part} of open_clip_config.json"):
        clip.infer_config(small_tensors(), changed(config, part, **{key: value}))


@pytest.mark.parametrize("part", ["vision_cfg", "text_cfg", "model_cfg", "preprocess_cfg"])
def test_a_part_that_is_none_and_one_of_another_type(config, part):
    inside = config if part in ("preprocess_cfg", "model_cfg") else config["model_cfg"]
    inside[part] = ["a list"]
    with pytest.raises(UserError, match=f"a JSON object under {part}"):
        clip.infer_config(small_tensors(), config)


def test_what_has_an_effect_is_used(config):
    changed(config, "vision_cfg", norm_kwargs={"eps": 1e-3}, act_kwargs={"approximate": "tanh"})
    changed(config, "text_cfg", norm_kwargs={"eps": 1e-2})
    found = clip.infer_config(small_tensors(), config)
    assert (found.image.norm_eps, found.image.activation) == (1e-3, "gelu_tanh")
    assert (found.text.norm_eps, found.text.activation) == (1e-2, "gelu")


def test_heads_that_a_file_does_not_state_are_those_of_open_clip(config):
    del config["model_cfg"]["text_cfg"]["heads"]
    assert clip.infer_config(small_tensors(), config).text.heads == 8
    config["model_cfg"]["vision_cfg"].pop("width")
    with pytest.raises(UserError):  # its default width of 768 is not the tensors', nor their heads
        clip.infer_config(small_tensors(), config)


def test_pooling_does_not_matter_where_tokens_are_taken(config):
    tensors = small_tensors()
    expected = clip_text.infer_config(tensors, config)
    assert clip_text.infer_config(tensors, changed(config, "text_cfg", pool_type="eos")) == expected


def test_keys_without_effect_change_nothing(config):
    for part, keys in PARTS.items():
        changed(config, part, **dict.fromkeys(keys.without_effect))
        changed(config, part, **{key: values[-1] for key, values in keys.only.items()})
    assert clip.infer_config(small_tensors(), config) == small_config("gelu")


def test_no_key_has_two_fates():
    for keys in PARTS.values():
        fates = [*keys.used, *keys.without_effect, *keys.only]
        assert len(fates) == len(set(fates))
