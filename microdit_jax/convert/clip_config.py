"""Reads the text tower's config out of a config file of OpenCLIP, of transformers or of ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from microdit_jax.convert import openclip_config, transformers_config
from microdit_jax.encoders.clip_text import ClipTextConfig
from microdit_jax.errors import UserError

FIELDS = tuple(field.name for field in dataclasses.fields(ClipTextConfig))


def stated_fields(config_json: Mapping[str, Any], *, pooled: bool = False) -> dict[str, Any]:
    """Reads those of ClipTextConfig's fields that a JSON file states.

    Args:
      config_json: contents of open_clip_config.json or of transformers' config.json, of a text
        model or a whole CLIP; or ClipTextConfig's fields.
      pooled: True if one embedding of a whole text is taken, as a CLIP score does.
    Raises:
      UserError: none of these, or a tower that is not CLIP's.
    """
    if "model_cfg" in config_json:
        return openclip_config.text_fields(config_json, pooled=pooled)
    if "hidden_act" in config_json or "text_config" in config_json:
        return transformers_config.text_fields(config_json, pooled=pooled)
    if unknown := [name for name in config_json if name not in FIELDS]:
        raise UserError(
            "expected open_clip_config.json (model_cfg), transformers' config.json (hidden_act) or "
            f"fields of ClipTextConfig ({', '.join(FIELDS)}), found {', '.join(unknown[:8])}; give "
            "the text tower's own config"
        )
    return {name: value for name, value in config_json.items() if value is not None}


def names_in(config_json: Mapping[str, Any]) -> dict[str, str]:
    """Names that a JSON file has for ClipTextConfig's fields, where they are others."""
    ours = "model_cfg" in config_json or set(config_json) <= set(FIELDS)
    return {} if ours else transformers_config.TEXT_NAMES
