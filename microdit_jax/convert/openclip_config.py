"""Reads OpenCLIP's open_clip_config.json: each key is used, without effect here, or refused.

Source of keys, defaults and effects: CLIPVisionCfg, CLIPTextCfg and CustomTextCLIP of open_clip
3.3. What the tensors' shapes and names tell is checked against those.
"""

from collections.abc import Mapping
from typing import Any

from microdit_jax.convert.config_keys import Keys
from microdit_jax.errors import visible

_FILE, _MODEL = "open_clip_config.json", "CLIP"
_PLAIN = ", as of a causal CLIP's plain towers"
_BLOCKS = {
    "ls_init_value": (None,),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn"), (None, False)),
    **dict.fromkeys(("scale_attn_inner", "scale_fc"), (None, False)),
    "block_type": (None, "default"),
}
# Without effect is what only training reads, what shapes and names of the tensors tell, and what
# acts only with a key that is refused, or with a pooling that is.
MODEL = Keys(
    _FILE,
    _MODEL,
    "model_cfg",
    used=("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"),
    without_effect=(
        *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "cast_dtype"),
        *("output_dict", "custom_text"),
    ),
    only={"multimodal_cfg": (None,)},
    plain=_PLAIN,
)
VISION = Keys(
    _FILE,
    _MODEL,
    "vision_cfg",
    used=(
        *("width", "layers", "head_width", "image_size", "patch_size", "norm_kwargs"),
        "act_kwargs",
    ),
    without_effect=(
        *("mlp_ratio", "patch_dropout", "output_tokens", "pos_embed_type", "final_ln_after_pool"),
        *("attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_pool"),
        *("timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    ),
    only={
        **_BLOCKS,
        "timm_model_name": (None,),
        **dict.fromkeys(("no_ln_pre", "attentional_pool"), (None, False)),
        "pool_type": (None, "tok"),
    },
    plain=_PLAIN,
)
TEXT = Keys(
    _FILE,
    _MODEL,
    "text_cfg",
    used=(
        *("width", "layers", "heads", "context_length", "vocab_size", "norm_kwargs"),
        "act_kwargs",
    ),
    without_effect=(
        *("mlp_ratio", "output_tokens", "final_ln_after_pool", "pad_id", "eos_id", "proj_bias"),
        *("proj_type", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "correct_cls_mask"),
    ),
    only={
        **_BLOCKS,
        **dict.fromkeys(("ls_init_value", "hf_model_name", "hf_tokenizer_name"), (None, "")),
        **dict.fromkeys(("no_causal_mask", "embed_cls"), (None, False)),
        "pool_type": (None, "argmax"),
        "tokenizer_mode": (None, "lower"),
        "tokenizer_kwargs": (None, {}),
    },
    plain=_PLAIN,
)
PREPARE = Keys(
    _FILE,
    _MODEL,
    "preprocess_cfg",
    used=("size", "mean", "std", "resize_mode"),
    without_effect=("fill_color",),  # of the margins that only the refused "longest" leaves
    only={"mode": (None, "RGB"), "interpolation": (None, "bicubic")},
    plain=_PLAIN,
)
IMAGE_NAMES = {"resize": "resize_mode"}  # ours -> theirs, for errors
TEXT_HEADS, VISION_WIDTH, HEAD_WIDTH, EPS = 8, 768, 64, 1e-5  # where a file does not state them


def text_fields(config: Mapping[str, Any], *, pooled: bool) -> dict[str, Any]:
    """Reads those of ClipTextConfig's fields that an open_clip_config.json states.

    Args:
      pooled: False if only the tokens' embeddings are taken, which no pooling changes.
    Raises:
      UserError: a key that is unknown, or has a value that this tower does not support.
    """
    model = MODEL.check(config.get("model_cfg") or {})
    given = model.get("text_cfg") or {}
    text = TEXT.check({**given, "pool_type": None} if _is_object(given) and not pooled else given)
    sizes = ("width", "layers", "heads", "context_length", "vocab_size")
    return {
        "activation": _activation(model, text, TEXT),
        "norm_eps": _eps(text, TEXT),
        "heads": TEXT_HEADS,
        **{name: text[name] for name in sizes if text.get(name) is not None},
    }


def image_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads those of ClipImageConfig's fields that an open_clip_config.json states.

    Raises:
      UserError: a key that is unknown, or has a value that this tower does not support.
    """
    model = MODEL.check(config.get("model_cfg") or {})
    vision = VISION.check(model.get("vision_cfg") or {})
    prepare = PREPARE.check(config.get("preprocess_cfg") or {})
    width, head = vision.get("width", VISION_WIDTH), vision.get("head_width", HEAD_WIDTH)
    if type(width) is not int or type(head) is not int or head < 1 or width % head:
        VISION.refuse("head_width", head, f"that divides the width {visible(width, 60)}")
    side, size = vision.get("image_size", 224), prepare.get("size")
    if size is not None and size not in (side, [side, side], (side, side)):
        PREPARE.refuse("size", size, f"of {visible(side, 60)}, as image_size has it")
    names = ("width", "layers", "image_size", "patch_size")
    return {
        "activation": _activation(model, vision, VISION),
        "norm_eps": _eps(vision, VISION),
        "heads": width // head,
        **{name: vision[name] for name in names if vision.get(name) is not None},
        **{name: prepare[name] for name in ("mean", "std") if prepare.get(name) is not None},
        "resize": "shortest" if prepare.get("resize_mode") is None else prepare["resize_mode"],
    }


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _activation(model: Mapping[str, Any], tower: Mapping[str, Any], part: Keys) -> str:
    kwargs = tower.get("act_kwargs") or {}
    known = isinstance(kwargs, Mapping) and set(kwargs) <= {"approximate"}
    approximate = kwargs.get("approximate", "none") if known else None
    quick = model.get("quick_gelu", False)
    if approximate not in ("none", "tanh") or (quick and kwargs):
        part.refuse("act_kwargs", kwargs, "of approximate none or tanh, and no quick_gelu beside")
    if type(quick) is not bool:
        MODEL.refuse("quick_gelu", quick, "true or false")
    return "quick_gelu" if quick else "gelu_tanh" if approximate == "tanh" else "gelu"


def _eps(tower: Mapping[str, Any], part: Keys) -> float:
    kwargs = tower.get("norm_kwargs") or {}
    if not isinstance(kwargs, Mapping) or set(kwargs) - {"eps"}:
        part.refuse("norm_kwargs", kwargs, "of eps alone")
    return kwargs.get("eps", EPS)
