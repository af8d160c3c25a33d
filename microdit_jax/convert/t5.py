"""Converts the T5 v1.1 encoder between transformers' state dict and our parameters."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from microdit_jax.convert.arguments import (
    config_from_fields,
    count_blocks,
    fields_by_our_names,
    matrix_shapes,
    open_folder,
    refuse_other_config,
    size_faults,
)
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
from microdit_jax.convert.transformers_config import T5_NAMES, T5_ONLY, t5_fields
from microdit_jax.encoders.t5 import T5, T5Config, T5Encoder, T5Tokenizer
from microdit_jax.encoders.transformer import BATCH
from microdit_jax.errors import UserError

_BLOCK, _ATTENTION, _FFN = "encoder.block", "layer.0.SelfAttention", "layer.1.DenseReluDense"
_BIAS = f"{_BLOCK}.0.{_ATTENTION}.relative_attention_bias.weight"
RULES = [
    Rule(r"shared/embedding", "shared.weight"),
    Rule(r"relative_attention_bias/embedding", _BIAS),
    Rule(r"block_(\d+)/attention_(\w)/kernel", rf"{_BLOCK}.\1.{_ATTENTION}.\2.weight", LINEAR),
    Rule(r"block_(\d+)/ffn_(\w+)/kernel", rf"{_BLOCK}.\1.{_FFN}.\2.weight", LINEAR, exact=True),
    Rule(r"block_(\d+)/layer_norm_(\d)/scale", rf"{_BLOCK}.\1.layer.\2.layer_norm.weight"),
    Rule(r"final_layer_norm/scale", "encoder.final_layer_norm.weight"),
]
_TIED = "encoder.embed_tokens.weight"  # the token table once more, in some files
# The decoder, and the tokenizer that ComfyUI packs into its files.
_ASIDE = re.compile(r"(decoder)\..*|(lm_head)\..*|spiece_model")


def select(state_dict: Mapping[str, Any]) -> StateDict:
    """Selects the encoder's tensors, and notes what else of a T5 was left out, unread."""
    tensors, aside = {}, {}
    for name, tensor in state_dict.items():
        if _ASIDE.fullmatch(name):
            top = name.split(".")[0]
            aside[top] = aside.get(top, 0) + 1
        else:
            tensors[name] = tensor
    if "shared.weight" not in tensors and _TIED in tensors:
        tensors["shared.weight"] = tensors.pop(_TIED)
    return StateDict(tensors, [f"ignored {n} tensors of {top}." for top, n in aside.items()])


def infer_config(
    state_dict: Mapping[str, Any],
    config_json: Mapping[str, Any] | None = None,
    *,
    max_tokens: int | None = None,
) -> T5Config:
    """Returns the config of the encoder whose state dict this is.

    Sizes come from the tensors' shapes, and must be those that config_json names; the rest is
    T5 v1.1's where config_json does not say otherwise.

    Args:
      state_dict: of an encoder or a whole T5, as transformers has it.
      config_json: contents of its config.json, or T5Config's fields.
      max_tokens: length to which texts are cut; None: 120, as in the reference.
    Raises:
      UserError: not a T5 v1.1 encoder, or a config of another network.
    """
    sizes = _sizes(select(state_dict).tensors)
    given = dict(config_json or {})
    fields, names = fields_by_our_names(T5Config, given, T5_NAMES, t5_fields)
    refuse_other_config(size_faults(fields, sizes, names))
    if max_tokens is not None:
        fields["max_tokens"] = max_tokens
    return config_from_fields(T5Config, fields | sizes, names)


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    config: T5Config,
    *,
    check_finite: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Params:
    """Converts transformers' state dict to parameters of `T5(config)`.

    Strict: what `select` leaves is used exactly once, in the shape the config asks for; the second
    copy of the token table, where there is one, must equal the first.

    Args:
      check_finite: refuse, and name, tensors with NaN or infinite values.
      progress: called with the number of bytes just checked.
    Returns:
      A nested dict of float32 numpy arrays; transposed views of the given ones where those are
      float32.
    Raises:
      UserError: tensors missing, unexpected, misshapen (all listed) or not finite, or two token
        tables.
    """
    tensors = dict(select(state_dict).tensors)
    tied = tensors.pop(_TIED, None)
    params = to_params(tensors, rename_table(config), check_finite=check_finite, progress=progress)
    if tied is not None and not np.array_equal(tied, tensors["shared.weight"]):
        raise UserError(
            f"expected shared.weight and {_TIED} to be one table, found two that differ; this is "
            "not T5's own weights"
        )
    return params


def to_torch(params: Params, config: T5Config) -> dict[str, np.ndarray]:
    """Converts parameters to a state dict that transformers' T5EncoderModel loads.

    Raises:
      UserError: parameters missing, unexpected or misshapen; all are listed.
    """
    return to_tensors(params, rename_table(config))


def config_from_dict(fields: Mapping[str, Any]) -> T5Config:
    """Returns a T5Config from the fields of a model folder's config.json.

    Raises:
      UserError: a field that T5Config does not have.
    """
    return config_from_fields(T5Config, fields)


def config_json(config: T5Config) -> dict[str, Any]:
    """Returns the config.json that transformers' T5EncoderModel.from_pretrained reads."""
    names = {theirs: getattr(config, ours) for ours, theirs in T5_NAMES.items()}
    required = {name: values[0] for name, values in T5_ONLY.items()}
    return {"architectures": ["T5EncoderModel"], **required, **names}


def describe(config: T5Config) -> str:
    """Describes a config in one line."""
    return (
        f"{config.layers} blocks of width {config.width}, {config.heads} heads of "
        f"{config.head_dim}, feed-forward {config.ffn}, {config.max_tokens} tokens"
    )


@functools.lru_cache(maxsize=32)
def rename_table(config: T5Config) -> Sequence[Entry]:
    """Every tensor of the encoder with the parameter it is."""
    ids = jax.ShapeDtypeStruct((1, config.max_tokens), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, bool)
    return tuple(build_table(RULES, abstract_params(T5(config), ids, mask)))


def load_encoder(
    folder: str | Path,
    name: str | None = None,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    batch: int = BATCH,
    **options: Any,
) -> T5Encoder:
    """Returns the encoder of a model folder made by `python -m convert --kind=t5`.

    Args:
      name: what data and models carry to find it again; by default the weights' checksum.
      tokenizer: folder or repository of its tokenizer; None: only ids can be encoded.
      dtype: type of the computation; None keeps the model's own.
      batch: texts the encoder takes at once.
      options: `sharding` and `verify`, as for microdit_jax.checkpoints.model_folder.load_model.
    Raises:
      UserError: not a model folder of this kind, or damaged, or no tokenizer there.
    """
    found = open_folder(folder, KIND.name, **options)
    config = config_from_dict(found.config)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    words = T5Tokenizer(tokenizer, config.max_tokens) if tokenizer else None
    return T5Encoder(name or found.name, config, found.params, words, batch=batch)


def _sizes(tensors: Mapping[str, Any]) -> dict[str, int]:
    """Reads T5Config's sizes off the tensors' shapes."""
    first = f"{_BLOCK}.0."
    if f"{first}{_FFN}.wi.weight" in tensors:
        raise UserError(
            "expected T5 v1.1 with a gated feed-forward (wi_0, wi_1), found the original T5 (wi); "
            "take v1.1's weights"
        )
    names = ("shared.weight", _BIAS, f"{first}{_ATTENTION}.q.weight", f"{first}{_FFN}.wi_0.weight")
    (vocab_size, width), (buckets, heads), (inner, _), (ffn, _) = matrix_shapes(
        tensors, names, "a T5 v1.1 encoder"
    )
    if inner % heads:
        raise UserError(f"expected q of {heads} equal heads, found width {inner}; is it damaged?")
    return {
        "width": width,
        "layers": count_blocks(tensors, _BLOCK),
        "heads": heads,
        "head_dim": inner // heads,
        "ffn": ffn,
        "vocab_size": vocab_size,
        "buckets": buckets,
    }


KIND = Kind(
    name="t5",
    part=None,  # its files hold it under its own names, the decoder beside it
    infer_config=infer_config,
    from_torch=from_torch,
    to_torch=to_torch,
    config_from_dict=config_from_dict,
    describe=describe,
    select=select,
    config_json=config_json,
    options=("max_tokens",),
    config_keys=("d_model",),
    stems=("model", "pytorch_model"),
    subfolders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    tokenizer_files=(
        "spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json",
    ),
)  # fmt: skip
