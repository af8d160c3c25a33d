"""Every key of the config files that diffusers, transformers and OpenCLIP write has a known fate.

Removed, of another type, or set to another value: it changes the config, is without effect and
known to be so, or is an error that names it. The files are those of diffusers 0.42.1, transformers
5.24.0 and open_clip 3.3 for small towers.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from support.golden_vae import load_vae
from support.recorded import recorded
from support.small_clip import openclip_config, small_config, small_tensors

from microdit_jax.convert import (
    clip,
    clip_text,
    t5,
    transformers_config,
)
from microdit_jax.convert import (
    openclip_config as openclip,
)
from microdit_jax.convert.kinds import get_kind
from microdit_jax.convert.vae import KEYS
from microdit_jax.errors import UserError

ANY: dict[str, Any] = {
    "dtype": "float32",
    "initializer_factor": 1.0,
    "transformers_version": "5.24.0",
}
TOWER = {
    **{"attention_dropout": 0.0, "hidden_act": "quick_gelu", "initializer_factor": 1.0},
    **{"initializer_range": 0.02, "layer_norm_eps": 1e-05, "projection_dim": 24},
}
TEXT = {
    **{"architectures": ["CLIPTextModel"], "bos_token_id": 49406, "dtype": "float32"},
    **{"eos_token_id": 49407, "hidden_size": 16, "intermediate_size": 64, "vocab_size": 64},
    **{"max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 2},
    **{"num_hidden_layers": 2, "pad_token_id": 1},
    **TOWER,
}
VISION = {
    **{"hidden_size": 32, "image_size": 32, "intermediate_size": 128, "num_channels": 3},
    **{"model_type": "clip_vision_model", "num_attention_heads": 4, "num_hidden_layers": 2},
    **{"patch_size": 8},
    **TOWER,
}
CLIP = ANY | {
    **{"architectures": ["CLIPModel"], "logit_scale_init_value": 2.6592, "model_type": "clip"},
    **{"projection_dim": 24, "text_config": TEXT, "vision_config": VISION},
}
T5 = ANY | {
    **{"architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "dense_act_fn": "gelu_new"},
    **{"dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu"},
    **{"is_decoder": False, "is_encoder_decoder": False, "is_gated_act": True, "model_type": "t5"},
    **{"num_decoder_layers": 2, "pad_token_id": 0, "scale_decoder_outputs": True},
    **{"tie_word_embeddings": True, "use_cache": False},
}
VALUES = (None, "x", "gelu", 3, 2, -1, 0, 0.5, True, False, [], {}, [1], ["x"], {"a": 1}, 10**400)
REMOVED = "removed"


def cases() -> dict[str, tuple[str, dict, dict]]:
    """Name -> kind, tensors and contents of the config file."""
    vae = load_vae("vae_small_sd3")
    with np.load(GOLDEN / "clip_small.npz") as golden:
        openclip_json = openclip_config(golden, "gelu")
    openclip_json["preprocess_cfg"] = {
        **{"size": 32, "mode": "RGB", "mean": [0.5] * 3, "std": [0.25] * 3},
        **{"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0},
    }
    t5_tensors, _ = recorded("t5_small")
    sizes = {
        theirs: getattr(t5.infer_config(t5_tensors), ours)
        for ours, theirs in transformers_config.T5_NAMES.items()
    }
    bert_tensors, others = recorded("bert_small")
    labels = ("id2label", "label2id")  # objects without effect
    bert_json = json.loads(str(others["config"]))
    bert_json = {key: value for key, value in bert_json.items() if key not in labels}
    text_config = clip_text.ClipTextConfig(width=16, layers=2, heads=2, vocab_size=64)
    names = clip_text.rename_table(text_config, "transformers")
    text = {e.torch_name: np.broadcast_to(np.float32(0.5), e.torch_shape) for e in names}
    return {
        "vae": ("vae", vae.tensors, vae.config_json),
        "clip_text": ("clip_text", text, ANY | TEXT),
        "clip": ("clip", small_tensors("transformers"), CLIP),
        "t5": ("t5", t5_tensors, T5 | sizes),
        "bert": ("bert", bert_tensors, bert_json),
        "open_clip": ("clip", small_tensors(), openclip_json),
    }


def paths(config: dict, start: tuple = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yields each key with those before it, and whether it is of an object."""
    for key, value in config.items():
        yield (*start, key), isinstance(value, dict)
        if isinstance(value, dict):
            yield from paths(value, (*start, key))


def changed(config: dict, path: tuple[str, ...], value: Any) -> dict:
    config = copy.deepcopy(config)
    inside = config
    for key in path[:-1]:
        inside = inside[key]
    if value is REMOVED:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return config


def without_effect() -> set[str]:
    """Keys that may have any value."""
    module = transformers_config
    parts = (module.TEXT, module.VISION, module.WHOLE, module.T5, module.BERT, KEYS)
    parts += (openclip.MODEL, openclip.VISION, openclip.TEXT, openclip.PREPARE)
    return {key for part in parts for key in part.without_effect}


@pytest.mark.parametrize("name", ["vae", "clip_text", "clip", "t5", "bert", "open_clip"])
def test_every_key_is_used_refused_by_name_or_without_effect(name):
    kind_name, tensors, config = cases()[name]
    kind = get_kind(kind_name)
    base = kind.make_config(tensors, config, {})
    fates: dict[tuple, set[str]] = {}
    for path, is_object in paths(config):
        for value in (REMOVED, *VALUES):
            given = changed(config, path, value)
            try:
                found = kind.make_config(tensors, given, {})
            except UserError as error:
                text = str(error)
                assert text.isprintable() and len(text) < 2000
                # Heads and groups are also told by what they must divide.
                named = [*path, "resize", "groups", "heads", "buckets", "width", "quant_conv"]
                assert is_object or any(key in text for key in named), (path, value, text)
                fate = "refused"
            else:
                fate = "the same" if found == base else "used"
            fates.setdefault(path, set()).add(fate)
        if is_object:
            assert "the same" not in fates.pop(path)
    for path, found in fates.items():
        # The end of a text matters where one embedding of it is taken.
        free = path[-1] in without_effect() and path != ("text_config", "eos_token_id")
        assert (found == {"the same"}) == free, (path, found)


def test_keys_of_older_files_are_known():
    """Two of what transformers 4 wrote into any config.json; a null is no setting."""
    older = CLIP | {"text_config_dict": {"hidden_size": 16}, "vision_config_dict": None}
    older["text_config"] = TEXT | {"pruned_heads": {}, "top_k": 50, "is_decoder": False}
    found = clip.infer_config(small_tensors("transformers"), older)
    assert found == dataclasses.replace(small_config(), text=found.text, image=found.image)
    for key, value in (
        ("pruned_heads", {"0": [1]}), ("is_decoder", True), ("quantization_config", {"bits": 8}),
        ("model_type", "siglip_text_model"), ("rope_theta", 1e4), ("eos_token_id", 7),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"expected {key} .*text_config of config.json, found"):
            clip.infer_config(
                small_tensors("transformers"), CLIP | {"text_config": TEXT | {key: value}}
            )
    other = CLIP | {"text_config_dict": {"hidden_act": "gelu"}}
    with pytest.raises(UserError, match="text_config_dict with hidden_act as in text_config"):
        clip.infer_config(small_tensors("transformers"), other)


def test_heads_of_a_file_that_leaves_them_out_are_those_of_transformers():
    """Eight, where 64 channels a head would be another number."""
    _, tensors, _ = cases()["clip_text"]
    text = {key: value for key, value in TEXT.items() if key != "num_attention_heads"}
    assert clip_text.infer_config(tensors, text).heads == 8


def test_config_files_with_wrong_types_are_one_line(tmp_path, capsys):
    """Through the command, where the malformed file is read from disk."""
    from support.convert_command import fails

    from microdit_jax.convert.formats.safetensors_file import write_safetensors

    _, tensors, config = cases()["clip"]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    for text in (json.dumps(changed(config, ("text_config",), [1])), "[]", "3", '{"a": NaN'):
        (tmp_path / "config.json").write_text(text)
        error = fails(
            capsys, "--kind=clip", f"--input={tmp_path}", f"--output={tmp_path / 'model'}"
        )
        assert re.search(r"text_config|config.json", error)
