"""Reads OpenCLIP's open_clip_config.json: each key is used, without effect here, or refused.

Source of keys, defaults and effects: CLIPVisionCfg, CLIPTextCfg and CustomTextCLIP of open_clip
3.3. What the tensors' shapes and names tell is checked against those.
"""

from collections.abc import Mapping
from typing import Any

from microdit_jax.errors import UserError, visible

USED = {
    "model_cfg": ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"),
    "vision_cfg": (
        *("width", "layers", "head_width", "image_size", "patch_size", "norm_kwargs"),
        "act_kwargs",
    ),
    "text_cfg": (
        *("width", "layers", "heads", "context_length", "vocab_size", "norm_kwargs"),
        "act_kwargs",
    ),
    "preprocess_cfg": ("size", "mean", "std", "resize_mode"),
}
# What only training reads, what shapes and names of the tensors tell, and what acts only with a key
# that is refused, or with a pooling that is.
WITHOUT_EFFECT = {
    "model_cfg": (
        *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "cast_dtype"),
        *("output_dict", "custom_text"),
    ),
    "vision_cfg": (
        *("mlp_ratio", "patch_dropout", "output_tokens", "pos_embed_type", "final_ln_after_pool"),
        *("attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_pool"),
        *("timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    ),
    "text_cfg": (
        *("mlp_ratio", "output_tokens", "final_ln_after_pool", "pad_id", "eos_id", "proj_bias"),
        *("proj_type", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "correct_cls_mask"),
    ),
    "preprocess_cfg": ("fill_color",),  # of the margins that only the refused "longest" leaves
}
# The only values that are supported; None stands for a key that is not there.
ONLY = {
    "model_cfg": {"multimodal_cfg": (None,)},
    "vision_cfg": {
        **dict.fromkeys(("ls_init_value", "timm_model_name"), (None,)),
        **dict.fromkeys(("no_ln_pre", "attentional_pool", "qk_norm"), (None, False)),
        **dict.fromkeys(("scaled_cosine_attn", "scale_heads", "scale_attn"), (None, False)),
        **dict.fromkeys(("scale_attn_inner", "scale_fc"), (None, False)),
        "block_type": (None, "default"),
        "pool_type": (None, "tok"),
    },
    "text_cfg": {
        **dict.fromkeys(("ls_init_value", "hf_model_name", "hf_tokenizer_name"), (None, "")),
        **dict.fromkeys(("no_causal_mask", "embed_cls", "qk_norm"), (None, False)),
        **dict.fromkeys(("scaled_cosine_attn", "scale_heads", "scale_attn"), (None, False)),
        **dict.fromkeys(("scale_attn_inner", "scale_fc"), (None, False)),
        "block_type": (None, "default"),
        "pool_type": (None, "argmax"),
        "tokenizer_mode": (None, "lower"),
        "tokenizer_kwargs": (None, {}),
    },
    "preprocess_cfg": {"mode": (None, "RGB"), "interpolation": (None, "bicubic")},
}
TEXT_HEADS, VISION_WIDTH, HEAD_WIDTH, EPS = 8, 768, 64, 1e-5  # where a file does not state them


def text_fields(config: Mapping[str, Any], *, pooled: bool) -> dict[str, Any]:
    """Reads those of ClipTextConfig's fields that an open_clip_config.json states.

    Args:
      pooled: False if only the tokens' embeddings are taken, which no pooling changes.
    Raises:
      UserError: a key that is unknown, or has a value that this tower does not support.
    """
    model = _checked("model_cfg", _part(config, "model_cfg"))
    given = _part(model, "text_cfg")
    text = _checked("text_cfg", given if pooled else {**given, "pool_type": None})
    sizes = ("width", "layers", "heads", "context_length", "vocab_size")
    return {
        "activation": _activation(model, text, "text_cfg"),
        "norm_eps": _eps(text, "text_cfg"),
        "heads": TEXT_HEADS,
        **{name: text[name] for name in sizes if text.get(name) is not None},
    }


def image_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads those of ClipImageConfig's fields that an open_clip_config.json states.

    Raises:
      UserError: a key that is unknown, or has a value that this tower does not support.
    """
    model = _checked("model_cfg", _part(config, "model_cfg"))
    vision = _checked("vision_cfg", _part(model, "vision_cfg"))
    prepare = _checked("preprocess_cfg", _part(config, "preprocess_cfg"))
    width, head = vision.get("width", VISION_WIDTH), vision.get("head_width", HEAD_WIDTH)
    if type(width) is not int or type(head) is not int or head < 1 or width % head:
        _refuse("vision_cfg", "head_width", head, f"that divides the width {visible(width, 60)}")
    side, size = vision.get("image_size", 224), prepare.get("size")
    if size is not None and size not in (side, [side, side], (side, side)):
        _refuse("preprocess_cfg", "size", size, f"of {visible(side, 60)}, as image_size has it")
    names = ("width", "layers", "image_size", "patch_size")
    return {
        "activation": _activation(model, vision, "vision_cfg"),
        "norm_eps": _eps(vision, "vision_cfg"),
        "heads": width // head,
        **{name: vision[name] for name in names if vision.get(name) is not None},
        **{name: prepare[name] for name in ("mean", "std") if prepare.get(name) is not None},
        "resize": prepare.get("resize_mode", "shortest"),
    }


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name) or {}
    if not isinstance(part, Mapping):
        raise UserError(
            f"expected a JSON object under {name} in open_clip_config.json, found "
            f"{visible(repr(part), 60)}; correct it"
        )
    return part


def _checked(name: str, part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a part of the config; raises UserError unless each of its keys is understood."""
    for key, value in part.items():
        if key in ONLY[name]:
            if not any(value is only or value == only for only in ONLY[name][key]):
                _refuse(name, key, value, _wanted(ONLY[name][key]))
        elif key not in USED[name] and key not in WITHOUT_EFFECT[name]:
            _refuse(name, key, value, "left out, as its effect is not known")
    return part


def _wanted(values: tuple) -> str:
    """Says which values a key may have."""
    stated = [repr(value) for value in values if value]
    return f"as {' or '.join(stated)}" if stated else "left out, as of a causal CLIP's plain towers"


def _refuse(part: str, key: str, value: Any, wanted: str) -> None:
    raise UserError(
        f"expected {visible(key, 60)} {wanted} in {part} of open_clip_config.json, found "
        f"{visible(key, 60)} {visible(value, 60)}; this CLIP is not supported"
    )


def _activation(model: Mapping[str, Any], tower: Mapping[str, Any], part: str) -> str:
    kwargs = tower.get("act_kwargs") or {}
    known = isinstance(kwargs, Mapping) and set(kwargs) <= {"approximate"}
    approximate = kwargs.get("approximate", "none") if known else None
    quick = model.get("quick_gelu", False)
    if approximate not in ("none", "tanh") or (quick and kwargs):
        _refuse(part, "act_kwargs", kwargs, "of approximate none or tanh, and no quick_gelu beside")
    if type(quick) is not bool:
        _refuse("model_cfg", "quick_gelu", quick, "true or false")
    return "quick_gelu" if quick else "gelu_tanh" if approximate == "tanh" else "gelu"


def _eps(tower: Mapping[str, Any], part: str) -> float:
    kwargs = tower.get("norm_kwargs") or {}
    if not isinstance(kwargs, Mapping) or set(kwargs) - {"eps"}:
        _refuse(part, "norm_kwargs", kwargs, "of eps alone")
    return kwargs.get("eps", EPS)
