"""Reads transformers' config.json of CLIP, T5 and BERT: each key is used, without effect, refused.

Source of keys, defaults and effects: CLIPConfig, CLIPTextConfig, CLIPVisionConfig, T5Config and
BertConfig of transformers 5.24, and the keys that versions from 4.0 on wrote into any config.json.
"""

from collections.abc import Mapping
from typing import Any

from microdit_jax.convert.config_keys import Keys
from microdit_jax.encoders.tokenizers import END_OF_TEXT

_FILE = "config.json"
# transformers' names of activations -> ours.
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# In any config.json: what training and generating read, and names of the file's own history.
_ANY = (
    *("_commit_hash", "_name_or_path", "architectures", "attn_implementation"),
    *("transformers_version", "torch_dtype", "dtype", "torchscript", "use_bfloat16", "return_dict"),
    *("_attn_implementation", "_attn_implementation_autoset", "_experts_implementation"),
    *("attn_implementation_autoset", "output_attentions", "output_hidden_states", "output_scores"),
    *("return_dict_in_generate", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings"),
    *("bad_words_ids", "begin_suppress_tokens", "suppress_tokens", "do_sample", "early_stopping"),
    *("diversity_penalty", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
    *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "top_k"),
    *("remove_invalid_values", "repetition_penalty", "temperature", "top_p", "typical_p"),
    *("finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "prefix"),
    *("task_specific_params", "tokenizer_class", "bos_token_id", "pad_token_id", "sep_token_id"),
    *("decoder_start_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size"),
    *("gradient_checkpointing", "is_encoder_decoder", "use_cache", "dropout", "attention_dropout"),
    *("initializer_factor", "initializer_range"),
)
_ONLY = {
    **dict.fromkeys(("is_decoder", "add_cross_attention", "use_bidirectional"), (None, False)),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}
# Our names of fields -> theirs.
TEXT_NAMES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_eps",
}
IMAGE_NAMES = {
    **{ours: TEXT_NAMES[ours] for ours in ("width", "layers", "heads", "ffn", "norm_eps")},
    **{name: name for name in ("image_size", "patch_size")},
}
# Their defaults, where a file leaves a key out.
TEXT_DEFAULTS = {"heads": 8, "norm_eps": 1e-5}
IMAGE_DEFAULTS = {
    **{"width": 768, "layers": 12, "heads": 12, "ffn": 3072, "image_size": 224, "patch_size": 32},
    "norm_eps": 1e-5,
}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# projection_dim of the parts: the projections' shapes tell it
TEXT = Keys(
    _FILE,
    "CLIP",
    "text_config",
    used=(
        *("hidden_act", "layer_norm_eps", "max_position_embeddings", "vocab_size", *_SIZES),
        "eos_token_id",
    ),
    without_effect=(*_ANY, "projection_dim"),
    only={**_ONLY, "model_type": ("clip_text_model", "clip", None)},
)
VISION = Keys(
    _FILE,
    "CLIP",
    "vision_config",
    used=("hidden_act", "layer_norm_eps", "image_size", "patch_size", "num_channels", *_SIZES),
    without_effect=(*_ANY, "projection_dim", "eos_token_id"),
    only={**_ONLY, "model_type": ("clip_vision_model", "clip", None)},
)
WHOLE = Keys(
    _FILE,
    "CLIP",
    used=("text_config", "vision_config", "text_config_dict", "vision_config_dict"),
    without_effect=(*_ANY, "projection_dim", "logit_scale_init_value", "eos_token_id"),
    only={**_ONLY, "model_type": ("clip", None)},
)
T5_NAMES = {
    "width": "d_model",
    "layers": "num_layers",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "ffn": "d_ff",
    "vocab_size": "vocab_size",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
}
# The activation is named by feed_forward_proj, and again by dense_act_fn in newer versions.
T5_ONLY = {
    "model_type": ("t5", None),
    "feed_forward_proj": ("gated-gelu",),
    "dense_act_fn": ("gelu_new", None),
    "is_gated_act": (True, None),
}
T5 = Keys(
    _FILE,
    "T5",
    used=tuple(T5_NAMES.values()),
    without_effect=(
        *_ANY,
        *(
            "classifier_dropout",
            "dropout_rate",
            "eos_token_id",
            "n_positions",
            "num_decoder_layers",
        ),
        *("output_past", "scale_decoder_outputs"),
    ),
    only={**_ONLY, **T5_ONLY},
)
BERT_NAMES = {
    **{ours: theirs for ours, theirs in TEXT_NAMES.items() if ours != "context_length"},
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
}
BERT_ONLY = {"model_type": ("bert", None), "position_embedding_type": ("absolute", None)}
BERT = Keys(
    _FILE,
    "BERT",
    used=("hidden_act", *BERT_NAMES.values()),
    without_effect=(
        *_ANY,
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"),
        *("eos_token_id", "directionality", "pooler_fc_size", "pooler_num_attention_heads"),
        *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
    ),
    only={**_ONLY, **BERT_ONLY},
)


def text_fields(config: Mapping[str, Any], *, pooled: bool) -> dict[str, Any]:
    """Reads those of ClipTextConfig's fields that a config.json states, of a whole CLIP or a tower.

    Args:
      pooled: True if one embedding of a whole text is taken, where its end matters.
    Raises:
      UserError: a key that is unknown, or has a value that this tower does not support.
    """
    if "text_config" in config:
        WHOLE.check(config)
    text = TEXT.check(_part(config, "text_config"))
    end = text.get("eos_token_id", END_OF_TEXT)
    # 2: versions before 4.31 wrote it, and took the highest id for the end whatever it said.
    if pooled and end not in (2, END_OF_TEXT, None):
        TEXT.refuse("eos_token_id", end, f"as {END_OF_TEXT}, the end of CLIP's texts,")
    stated = {ours: text[theirs] for ours, theirs in TEXT_NAMES.items() if theirs in text}
    return {"activation": _activation(text, TEXT), **TEXT_DEFAULTS, **stated}


def image_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads ClipImageConfig's fields out of a whole CLIP's config.json.

    Raises:
      UserError: a key that is unknown, or has a value that this tower does not support.
    """
    WHOLE.check(config)
    vision = VISION.check(_part(config, "vision_config"))
    if vision.get("num_channels", 3) != 3:
        VISION.refuse("num_channels", vision["num_channels"], "as 3")
    stated = {ours: vision[theirs] for ours, theirs in IMAGE_NAMES.items() if theirs in vision}
    return {"activation": _activation(vision, VISION), **IMAGE_DEFAULTS, **stated}


def t5_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads those of T5Config's fields that a config.json states.

    Raises:
      UserError: a key that is unknown, or has a value that this encoder does not support.
    """
    T5.check(config)
    if "feed_forward_proj" not in config:  # transformers would take relu
        T5.refuse("feed_forward_proj", "none", "as 'gated-gelu'")
    return {ours: config[theirs] for ours, theirs in T5_NAMES.items() if theirs in config}


def bert_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads BertConfig's fields out of a config.json.

    Raises:
      UserError: a key that is unknown, or has a value that this encoder does not support.
    """
    BERT.check(config)
    stated = {ours: config[theirs] for ours, theirs in BERT_NAMES.items() if theirs in config}
    return {"activation": _activation(config, BERT, "gelu"), "norm_eps": 1e-12, **stated}


def _part(config: Mapping[str, Any], name: str) -> Any:
    """A tower's part of a whole CLIP's config, or the config itself."""
    if name not in config:
        return config
    part, older = ({} if config.get(key) is None else config[key] for key in (name, f"{name}_dict"))
    if isinstance(part, Mapping) and isinstance(older, Mapping):
        # transformers lets the older part win; where both agree that does not matter.
        for key, value in older.items():
            if part.get(key, value) != value:
                WHOLE.refuse(f"{name}_dict", f"{key} {value}", f"with {key} as in {name}")
        return {**older, **part}
    return part


def _activation(tower: Mapping[str, Any], keys: Keys, default: str = "quick_gelu") -> str:
    act = tower.get("hidden_act", default)
    if not isinstance(act, str) or act not in ACTIVATIONS:
        keys.refuse("hidden_act", act, f"of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]
