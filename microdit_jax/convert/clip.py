"""Converts a whole CLIP, for CLIP score, between torch state dicts and our parameters.

Both OpenCLIP's and transformers' names are known. The text tower's rules are those of clip_text.py,
and the image tower's blocks follow the same rules under another prefix.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microdit_jax.convert import clip_text, openclip_config, transformers_config
from microdit_jax.convert.arguments import (
    OTHER_KIND,
    config_from_fields,
    count_blocks,
    matrix_shapes,
    open_folder,
    refuse_other_config,
    shape_of,
    size_faults,
)
from microdit_jax.convert.keymap import (
    CONV,
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
from microdit_jax.encoders.clip import Clip, ClipConfig, ClipEncoder
from microdit_jax.encoders.clip_image import ClipImageConfig
from microdit_jax.encoders.clip_text import ClipTextConfig
from microdit_jax.errors import UserError

_EMBEDDINGS = "vision_model.embeddings"
_OWN = {
    "openclip": [
        Rule(r"text_projection", "text_projection"),
        Rule(r"image_projection", "visual.proj"),
        Rule(r"image/class_embedding", "visual.class_embedding"),
        Rule(r"image/positional_embedding", "visual.positional_embedding"),
        Rule(r"image/conv1/kernel", "visual.conv1.weight", CONV),
        Rule(r"image/(ln_pre|ln_post)/scale", r"visual.\1.weight", exact=True),
        Rule(r"image/(ln_pre|ln_post)/bias", r"visual.\1.bias", exact=True),
    ],
    "transformers": [
        Rule(r"text_projection", "text_projection.weight", LINEAR),
        Rule(r"image_projection", "visual_projection.weight", LINEAR),
        Rule(r"image/class_embedding", f"{_EMBEDDINGS}.class_embedding"),
        Rule(r"image/positional_embedding", f"{_EMBEDDINGS}.position_embedding.weight"),
        Rule(r"image/conv1/kernel", f"{_EMBEDDINGS}.patch_embedding.weight", CONV),
        # The misspelt name is transformers' own.
        Rule(r"image/ln_pre/scale", "vision_model.pre_layrnorm.weight"),
        Rule(r"image/ln_pre/bias", "vision_model.pre_layrnorm.bias"),
        Rule(r"image/ln_post/scale", "vision_model.post_layernorm.weight"),
        Rule(r"image/ln_post/bias", "vision_model.post_layernorm.bias"),
    ],
}


class _Names(NamedTuple):
    """Names in one layout of the image tower's tensors that tell its sizes, and of its blocks.

    A text block's prefix, `text_blocks`, becomes an image block's, `blocks`; the same names follow.
    """

    conv: str
    first_ffn: str
    blocks: str
    text_blocks: str


_NAMES = {
    "openclip": _Names(
        "visual.conv1.weight",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "visual.transformer.resblocks",
        "transformer.resblocks",
    ),
    "transformers": _Names(
        f"{_EMBEDDINGS}.patch_embedding.weight",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "vision_model.encoder.layers",
        "text_model.encoder.layers",
    ),
}


def _rules(layout: str) -> list[Rule]:
    """Makes the rules of both towers from those of the text tower."""
    old, new = _NAMES[layout].text_blocks, _NAMES[layout].blocks

    def inside(tower: str, rule: Rule, rename: Callable[[str], str]) -> Rule:
        assert not callable(rule.name)  # the text tower's rules are templates
        templates = [rule.name] if isinstance(rule.name, str) else rule.name
        names = [rename(template) for template in templates]
        return dataclasses.replace(rule, pattern=f"{tower}/{rule.pattern}", name=names)

    text = clip_text.RULES[layout]
    blocks = [rule for rule in text if rule.pattern.startswith("resblocks")]
    return [
        *(inside("text", rule, lambda name: name) for rule in text),
        *(inside("image", rule, lambda name: name.replace(old, new)) for rule in blocks),
        *_OWN[layout],
        Rule(r"logit_scale", "logit_scale"),
    ]


def select(state_dict: Mapping[str, Any]) -> StateDict:
    """Leaves out older files' tables of positions 0, 1, 2, ..., and strips the prefix "text.".

    That is the prefix in OpenCLIP's models with a text tower of their own.
    """
    tensors = {
        name.removeprefix("text."): tensor
        for name, tensor in state_dict.items()
        if not name.endswith(".position_ids")
    }
    aside = len(state_dict) - len(tensors)
    return StateDict(tensors, [f"ignored {aside} position_ids"] if aside else [])


def infer_config(
    state_dict: Mapping[str, Any], config_json: Mapping[str, Any] | None = None
) -> ClipConfig:
    """Returns the config of the CLIP whose state dict this is.

    Args:
      config_json: contents of open_clip_config.json, of transformers' config.json, or ClipConfig's
        fields.
    Raises:
      UserError: not such a CLIP, no config, or a config of another network.
    """
    if not config_json:
        raise UserError(
            "expected open_clip_config.json or config.json beside a CLIP's weights, found neither; "
            "add that file: the weights do not tell the activation and the heads"
        )
    tensors = select(state_dict).tensors
    layout = _layout(tensors)
    sizes, given = _image_sizes(tensors, layout), _image_fields(config_json)
    theirs = {"vision_config": transformers_config, "model_cfg": openclip_config}
    names = next((module.IMAGE_NAMES for key, module in theirs.items() if key in config_json), {})
    faults = size_faults(given, sizes, names)
    refuse_other_config(faults)
    text = clip_text.infer_config(tensors, config_json.get("text", config_json), pooled=True)
    # (d, e) in OpenCLIP, a linear layer's (e, d) in transformers
    name = {"openclip": "text_projection", "transformers": "text_projection.weight"}[layout]
    ((rows, columns),) = matrix_shapes(tensors, [name], "a CLIP")
    embed_dim = rows if layout == "transformers" else columns
    stated = config_json.get("model_cfg") or {}  # checked to be an object above
    refuse_other_config(size_faults(stated, {"embed_dim": embed_dim}))
    return ClipConfig(text, config_from_fields(ClipImageConfig, given | sizes, names), embed_dim)


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    config: ClipConfig,
    *,
    check_finite: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Params:
    """Converts a state dict of OpenCLIP or transformers to parameters of `Clip(config)`.

    Raises:
      UserError: tensors missing, unexpected, misshapen (all listed) or not finite.
    """
    tensors = select(state_dict).tensors
    layout = _layout(tensors)
    # transformers kept the scale as a vector of one for a while
    if "logit_scale" in tensors and tensors["logit_scale"].shape == (1,):
        tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    table = rename_table(config, layout)
    return to_params(tensors, table, check_finite=check_finite, progress=progress)


def to_torch(
    params: Params, config: ClipConfig, *, layout: str = "openclip"
) -> dict[str, np.ndarray]:
    """Converts parameters of `Clip(config)` to a state dict in a layout's names.

    Args:
      layout: "openclip" or "transformers".

    Raises:
      UserError: parameters missing, unexpected or misshapen; all are listed.
    """
    return to_tensors(params, rename_table(config, layout))


def config_from_dict(fields: Mapping[str, Any]) -> ClipConfig:
    """Returns a ClipConfig from the fields of a model folder's config.json.

    Raises:
      UserError: a field that the config does not have.
    """
    towers = {"text": ClipTextConfig, "image": ClipImageConfig}
    made = {name: config_from_fields(cls, fields.get(name, {})) for name, cls in towers.items()}
    return config_from_fields(ClipConfig, {**fields, **made})


def config_json(config: ClipConfig) -> dict[str, Any]:
    """Returns all fields of the config, for a config.json beside the torch weights."""
    return dataclasses.asdict(config)


def describe(config: ClipConfig) -> str:
    """Describes a config in one line."""
    image = config.image
    return (
        f"images of {image.image_size} px in patches of {image.patch_size}, {image.layers} "
        f"blocks of width {image.width}; text: {clip_text.describe(config.text)}; "
        f"{config.embed_dim} in common"
    )


@functools.lru_cache(maxsize=16)
def rename_table(config: ClipConfig, layout: str) -> Sequence[Entry]:
    """Every tensor of a layout ("openclip", "transformers") with the parameter it belongs to."""
    side = config.image.image_size
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)
    return tuple(build_table(_rules(layout), abstract_params(Clip(config), pixels, ids)))


def load_encoder(
    folder: str | Path, *, batch: int = 32, sharding: Any = None, verify: bool = True
) -> ClipEncoder:
    """Returns the CLIP of a model folder made by `python -m convert --kind=clip`.

    Raises:
      UserError: not a model folder of this kind, or damaged.
    """
    found = open_folder(folder, KIND.name, sharding=sharding, verify=verify)
    return ClipEncoder(found.name, config_from_dict(found.config), found.params, batch=batch)


def _layout(tensors: Mapping[str, Any]) -> str:
    """Tells "transformers" from "openclip" by the name of the image tower's first convolution."""
    return "transformers" if _NAMES["transformers"].conv in tensors else "openclip"


def _image_fields(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Reads those of ClipImageConfig's fields that a JSON file states."""
    if "model_cfg" in config_json:
        return openclip_config.image_fields(config_json)
    if "vision_config" in config_json:
        return transformers_config.image_fields(config_json)
    if "image" in config_json:
        return dataclasses.asdict(config_from_fields(ClipImageConfig, config_json["image"]))
    raise UserError(
        "expected open_clip_config.json (model_cfg), transformers' config.json (vision_config) or "
        f"fields of ClipConfig, found {', '.join(list(config_json)[:8])}; give the CLIP's config"
    )


def _image_sizes(tensors: Mapping[str, Any], layout: str) -> dict[str, int]:
    """Reads ClipImageConfig's sizes off the tensors' shapes."""
    names = _NAMES[layout]
    conv, dense = shape_of(tensors, names.conv), shape_of(tensors, names.first_ffn)
    if (len(conv), len(dense)) != (4, 2):
        wanted = " or ".join(names.conv for names in _NAMES.values())
        found = ", ".join(list(tensors)[:5]) or "no tensor"
        raise UserError(
            f"expected a CLIP with both towers ({wanted}), found neither among {len(tensors)} "
            f"tensors ({found}, ...); {OTHER_KIND}"
        )
    layers = count_blocks(tensors, names.blocks)
    return {"width": conv[0], "patch_size": conv[2], "ffn": dense[0], "layers": layers}


KIND = Kind(
    name="clip",
    part="clip",
    infer_config=infer_config,
    from_torch=from_torch,
    to_torch=to_torch,
    config_from_dict=config_from_dict,
    describe=describe,
    select=select,
    config_json=config_json,
    config_keys=("model_cfg", "vision_config", "image"),
    config_files=("open_clip_config.json", "config.json"),
    stems=("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model"),
)
