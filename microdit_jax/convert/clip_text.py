"""Converts CLIP's text tower between OpenCLIP's or transformers' state dict and our parameters."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microdit_jax.convert.arguments import (
    OTHER_KIND,
    config_from_fields,
    count_blocks,
    matrix_shapes,
    open_folder,
    refuse_other_config,
    size_faults,
)
from microdit_jax.convert.clip_config import names_in, stated_fields
from microdit_jax.convert.keymap import (
    LINEAR,
    Entry,
    Params,
    Rule,
    abstract_params,
    build_table,
    to_params,
    to_tensors,
)
from microdit_jax.convert.kinds import Kind
from microdit_jax.convert.state_dict import StateDict
from microdit_jax.encoders.clip_text import ClipText, ClipTextConfig, ClipTextEncoder
from microdit_jax.encoders.tokenizers import END_OF_TEXT, PADDING
from microdit_jax.encoders.transformer import BATCH
from microdit_jax.errors import UserError

_BLOCK = "transformer.resblocks"
_LAYER = "text_model.encoder.layers"
_QKV = ("q_proj", "k_proj", "v_proj")
# Our names are OpenCLIP's; its attention is one fused tensor, which transformers has as three.
RULES = {
    "openclip": [
        Rule(r"positional_embedding", "positional_embedding"),
        Rule(r"token_embedding/embedding", "token_embedding.weight"),
        Rule(r"resblocks_(\d+)/attn_in_proj/kernel", rf"{_BLOCK}.\1.attn.in_proj_weight", LINEAR),
        Rule(r"resblocks_(\d+)/attn_in_proj/bias", rf"{_BLOCK}.\1.attn.in_proj_bias"),
        Rule(r"resblocks_(\d+)/(attn|mlp)_(\w+)/kernel", rf"{_BLOCK}.\1.\2.\3.weight", LINEAR),
        Rule(r"resblocks_(\d+)/(attn|mlp)_(\w+)/bias", rf"{_BLOCK}.\1.\2.\3.bias"),
        Rule(r"resblocks_(\d+)/(ln_\d)/scale", rf"{_BLOCK}.\1.\2.weight", exact=True),
        Rule(r"resblocks_(\d+)/(ln_\d)/bias", rf"{_BLOCK}.\1.\2.bias", exact=True),
        Rule(r"ln_final/scale", "ln_final.weight"),
        Rule(r"ln_final/bias", "ln_final.bias"),
    ],
    "transformers": [
        Rule(r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
        Rule(r"token_embedding/embedding", "text_model.embeddings.token_embedding.weight"),
        Rule(
            r"resblocks_(\d+)/attn_in_proj/kernel",
            [rf"{_LAYER}.\1.self_attn.{name}.weight" for name in _QKV],
            LINEAR,
        ),
        Rule(
            r"resblocks_(\d+)/attn_in_proj/bias",
            [rf"{_LAYER}.\1.self_attn.{name}.bias" for name in _QKV],
        ),
        Rule(
            r"resblocks_(\d+)/attn_(out_proj)/kernel", rf"{_LAYER}.\1.self_attn.\2.weight", LINEAR
        ),
        Rule(r"resblocks_(\d+)/attn_(out_proj)/bias", rf"{_LAYER}.\1.self_attn.\2.bias"),
        Rule(r"resblocks_(\d+)/mlp_c_fc/kernel", rf"{_LAYER}.\1.mlp.fc1.weight", LINEAR),
        Rule(r"resblocks_(\d+)/mlp_c_fc/bias", rf"{_LAYER}.\1.mlp.fc1.bias"),
        Rule(r"resblocks_(\d+)/mlp_c_proj/kernel", rf"{_LAYER}.\1.mlp.fc2.weight", LINEAR),
        Rule(r"resblocks_(\d+)/mlp_c_proj/bias", rf"{_LAYER}.\1.mlp.fc2.bias"),
        Rule(r"resblocks_(\d+)/ln_(\d)/scale", rf"{_LAYER}.\1.layer_norm\2.weight"),
        Rule(r"resblocks_(\d+)/ln_(\d)/bias", rf"{_LAYER}.\1.layer_norm\2.bias"),
        Rule(r"ln_final/scale", "text_model.final_layer_norm.weight"),
        Rule(r"ln_final/bias", "text_model.final_layer_norm.bias"),
    ],
}


class _Names(NamedTuple):
    """Names in one layout of the tensors that tell a text tower's sizes, and its blocks' prefix."""

    tokens: str
    positions: str
    first_ffn: str
    blocks: str


_NAMES = {
    "openclip": _Names(
        "token_embedding.weight", "positional_embedding", f"{_BLOCK}.0.mlp.c_fc.weight", _BLOCK
    ),
    "transformers": _Names(
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        f"{_LAYER}.0.mlp.fc1.weight",
        _LAYER,
    ),
}
# Names of a CLIP's other tensors, which are left out unread.
_ASIDE = re.compile(
    r"(visual|vision_model|visual_projection|text_projection)\..*"
    r"|text_projection|logit_scale|logit_bias|text_model\.embeddings\.position_ids"
)
_HEAD_DIM = 64  # of every CLIP text tower, where no config says otherwise


def select(state_dict: Mapping[str, Any]) -> StateDict:
    """Selects the text transformer's tensors, and notes what else of a CLIP was left out.

    The image tower of a memory-mapped file is not read. Names that no CLIP has stay in, for
    from_torch to refuse.
    """
    tensors, aside = {}, {}
    # transformers 5 writes a text model alone without the prefix.
    bare = "embeddings.token_embedding.weight" in state_dict
    for name, tensor in state_dict.items():
        if bare and re.match(r"(embeddings|encoder|final_layer_norm)\.", name):
            name = f"text_model.{name}"
        if _ASIDE.fullmatch(name):
            top = name if name.endswith("position_ids") else name.split(".")[0]
            aside.setdefault(top, []).append(name)
        else:
            tensors[name] = tensor
    notes = [
        f"ignored {len(names)} tensors of {top}." if names != [top] else f"ignored {top}"
        for top, names in aside.items()
    ]
    return StateDict(tensors, notes)


def infer_config(
    state_dict: Mapping[str, Any],
    config_json: Mapping[str, Any] | None = None,
    *,
    activation: str | None = None,
    heads: int | None = None,
    padding: int | None = None,
    pooled: bool = False,
) -> ClipTextConfig:
    """Returns the config of the text tower whose state dict this is.

    Sizes come from the tensors' shapes, and must be those that config_json names.

    Args:
      state_dict: of a text tower or a whole CLIP, as OpenCLIP or transformers has it.
      config_json: contents of open_clip_config.json, or of transformers' config.json, or
        ClipTextConfig's fields.
      activation: for weights without a config; the weights do not tell it.
      heads: for weights without a config whose heads are not 64 wide.
      padding: id after a text's end. By default 0, but END_OF_TEXT for QuickGELU towers in
        transformers' layout (Stable Diffusion 1.x; huggingface/diffusers issue 2201).
      pooled: True for the text tower of a whole CLIP, whose pooling matters.
    Raises:
      UserError: not such a text tower, no activation, or a config of another network.
    """
    tensors = select(state_dict).tensors
    layout = _layout(tensors)
    sizes = _sizes(tensors, layout)
    given = stated_fields(config_json or {}, pooled=pooled)
    names = names_in(config_json or {})
    faults = size_faults(given, sizes, names)
    flags = {"activation": activation, "heads": heads, "padding": padding}
    for name, value in flags.items():
        if value is not None and given.setdefault(name, value) != value:
            faults.append(f"{name} {given[name]} (asked for is {value})")
    refuse_other_config(faults)
    if "activation" not in given:
        raise UserError(
            "expected the activation of the text tower in open_clip_config.json or config.json "
            "beside its weights, found neither; add that file, or convert it first: "
            "python -m convert --kind=clip_text --activation=quick_gelu (OpenAI's and DFN's CLIP "
            "and SD 1.x; gelu for LAION's and SD 2.x; the weights do not tell)"
        )
    if "heads" not in given and sizes["width"] % _HEAD_DIM:
        raise UserError(
            f"expected a width in a multiple of {_HEAD_DIM}, found {sizes['width']}; "
            "convert it first: python -m convert --kind=clip_text --heads=..."
        )
    hf_openai = layout == "transformers" and given["activation"] == "quick_gelu"
    computed = {
        "heads": sizes["width"] // _HEAD_DIM,
        "padding": END_OF_TEXT if hf_openai else PADDING,
    }
    return config_from_fields(ClipTextConfig, computed | given | sizes, names)


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    config: ClipTextConfig,
    *,
    check_finite: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Params:
    """Converts a state dict of OpenCLIP or transformers to parameters of `ClipText(config)`.

    Strict: what `select` leaves is used exactly once, in the shape the config asks for.

    Args:
      check_finite: refuse, and name, tensors with NaN or infinite values.
      progress: called with the number of bytes just checked.
    Returns:
      A nested dict of float32 numpy arrays; transposed views of the given ones where those are
      float32, but for attention's fused q, k and v out of transformers' layout.
    Raises:
      UserError: tensors missing, unexpected, misshapen (all listed) or not finite.
    """
    tensors = select(state_dict).tensors
    table = rename_table(config, _layout(tensors))
    return to_params(tensors, table, check_finite=check_finite, progress=progress)


def to_torch(
    params: Params, config: ClipTextConfig, *, layout: str = "openclip"
) -> dict[str, np.ndarray]:
    """Converts parameters of `ClipText(config)` to a state dict, views wherever possible.

    Args:
      layout: whose names: "openclip", or "transformers" for its CLIPTextModel. Neither has the
        projection and logit_scale that a whole CLIP has beside them: they were never read.
    Raises:
      UserError: parameters missing, unexpected or misshapen; all are listed.
    """
    return to_tensors(params, rename_table(config, layout))


def config_from_dict(fields: Mapping[str, Any]) -> ClipTextConfig:
    """Returns a ClipTextConfig from the fields of a model folder's config.json.

    Raises:
      UserError: a field that ClipTextConfig does not have.
    """
    return config_from_fields(ClipTextConfig, fields)


def config_json(config: ClipTextConfig) -> dict[str, Any]:
    """Returns all fields of the config, for a config.json beside the torch weights."""
    return dataclasses.asdict(config)


def describe(config: ClipTextConfig) -> str:
    """Describes a config in one line."""
    return (
        f"{config.layers} blocks of width {config.width}, {config.heads} heads, "
        f"{config.activation}, {config.context_length} tokens padded with {config.padding}"
    )


@functools.lru_cache(maxsize=32)
def rename_table(config: ClipTextConfig, layout: str) -> Sequence[Entry]:
    """Every tensor of a layout ("openclip", "transformers") with the parameter it belongs to."""
    ids = jax.ShapeDtypeStruct((1, config.context_length), jnp.int32)
    return tuple(build_table(RULES[layout], abstract_params(ClipText(config), ids)))


def load_encoder(
    folder: str | Path,
    name: str | None = None,
    *,
    dtype: str | None = None,
    batch: int = BATCH,
    **options: Any,
) -> ClipTextEncoder:
    """Returns the text tower of a model folder made by `python -m convert --kind=clip_text`.

    Args:
      name: what data and models carry to find it again; by default the weights' checksum.
      dtype: type of the computation; None keeps the model's own.
      batch: texts the tower takes at once.
      options: `sharding` and `verify`, as for microdit_jax.checkpoints.model_folder.load_model.
    Raises:
      UserError: not a model folder of this kind, or damaged.
    """
    found = open_folder(folder, KIND.name, **options)
    config = config_from_dict(found.config)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    return ClipTextEncoder(name or found.name, config, found.params, batch=batch)


def _layout(tensors: Mapping[str, Any]) -> str:
    """Tells "openclip" from "transformers" by the token table's name."""
    for layout, names in _NAMES.items():
        if names.tokens in tensors:
            return layout
    wanted = " or ".join(names.tokens for names in _NAMES.values())
    found = ", ".join(list(tensors)[:5]) or "no tensor"
    raise UserError(
        f"expected a CLIP text tower with {wanted}, found neither among {len(tensors)} "
        f"tensors ({found}, ...); {OTHER_KIND}"
    )


def _sizes(tensors: Mapping[str, Any], layout: str) -> dict[str, int]:
    """Reads ClipTextConfig's sizes off the tensors' shapes."""
    names = _NAMES[layout]
    (vocab_size, width), (context_length, _), (ffn, _) = matrix_shapes(
        tensors, (names.tokens, names.positions, names.first_ffn), "a CLIP text tower"
    )
    return {
        "width": width,
        "layers": count_blocks(tensors, names.blocks),
        "context_length": context_length,
        "vocab_size": vocab_size,
        "ffn": ffn,
    }


KIND = Kind(
    name="clip_text",
    part="text",  # its name in OpenCLIP's models with a text tower of their own
    infer_config=infer_config,
    from_torch=from_torch,
    to_torch=to_torch,
    config_from_dict=config_from_dict,
    describe=describe,
    select=select,
    config_json=config_json,
    options=("activation", "heads", "padding"),
    config_keys=("model_cfg", "hidden_act", "text_config"),
    config_files=("open_clip_config.json", "config.json"),
    stems=("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model"),
    subfolders=("text_encoder",),
)
