"""Converts a BERT encoder between transformers' state dict and our parameters."""

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
from microdit_jax.convert.transformers_config import (
    ACTIVATIONS,
    BERT_NAMES,
    BERT_ONLY,
    bert_fields,
)
from microdit_jax.encoders.bert import (
    MAX_TOKENS,
    TOKENIZER,
    Bert,
    BertConfig,
    BertEncoder,
    BertTokenizer,
)
from microdit_jax.encoders.transformer import BATCH
from microdit_jax.errors import UserError

_LAYER = "encoder.layer"
# Our names of a layer's parts -> transformers'.
_LINEAR = {
    **{name: f"attention.self.{name}" for name in ("query", "key", "value")},
    "attention_output": "attention.output.dense",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "ffn_norm": "output.LayerNorm"}
RULES = [
    Rule(r"(\w+_embeddings)/embedding", r"embeddings.\1.weight"),
    Rule(r"embeddings_norm/scale", "embeddings.LayerNorm.weight"),
    Rule(r"embeddings_norm/bias", "embeddings.LayerNorm.bias"),
]
for _ours, _theirs in (_LINEAR | _NORMS).items():
    _at, _name = rf"layer_(\d+)/{_ours}", rf"{_LAYER}.\1.{_theirs}"
    RULES += [
        Rule(f"{_at}/kernel", f"{_name}.weight", LINEAR),
        Rule(f"{_at}/scale", f"{_name}.weight"),
        Rule(f"{_at}/bias", f"{_name}.bias"),
    ]
_WORDS = "embeddings.word_embeddings.weight"
# Heads of the tasks that a BERT was trained on, and its positions counted out.
_ASIDE = re.compile(r"(pooler|cls|classifier|qa_outputs)\..*|embeddings\.(position_ids)")


def select(state_dict: Mapping[str, Any]) -> StateDict:
    """Selects the encoder's tensors, and notes what else of a BERT was left out, unread."""
    tensors, aside = {}, {}
    inside = f"bert.{_WORDS}" in state_dict  # of a model with a head, which has its BERT in it
    for name, tensor in state_dict.items():
        name = name.removeprefix("bert.") if inside else name
        if found := _ASIDE.fullmatch(name):
            top = found[1] or found[2]
            aside[top] = aside.get(top, 0) + 1
        else:
            tensors[name] = tensor
    return StateDict(tensors, [f"ignored {n} tensors of {top}." for top, n in aside.items()])


def infer_config(
    state_dict: Mapping[str, Any],
    config_json: Mapping[str, Any] | None = None,
    *,
    max_tokens: int | None = None,
) -> BertConfig:
    """Returns the config of the encoder whose state dict this is.

    Sizes come from the tensors' shapes, and must be those that config_json names.

    Args:
      state_dict: of a BERT, alone or with a head, as transformers has it.
      config_json: contents of its config.json, or BertConfig's fields; the number of heads is
        nowhere else.
      max_tokens: length to which texts are cut; None: 64, or all positions if these are fewer.
    Raises:
      UserError: not a BERT, no config, or that of another network.
    """
    sizes = _sizes(select(state_dict).tensors)
    given = dict(config_json or {})
    if not given:
        raise UserError(
            "expected a BERT's config.json beside its weights, which alone tells its heads, found "
            "none; fetch it"
        )
    fields, names = fields_by_our_names(BertConfig, given, BERT_NAMES, bert_fields)
    refuse_other_config(size_faults(fields, sizes, names))
    if max_tokens is not None:
        fields["max_tokens"] = max_tokens
    fields.setdefault("max_tokens", min(MAX_TOKENS, sizes["positions"]))
    return config_from_fields(BertConfig, fields | sizes, names)


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    config: BertConfig,
    *,
    check_finite: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Params:
    """Converts transformers' state dict to parameters of `Bert(config)`.

    Strict: what `select` leaves is used exactly once, in the shape the config asks for.

    Args:
      check_finite: refuse, and name, tensors with NaN or infinite values.
      progress: called with the number of bytes just checked.
    Returns:
      A nested dict of float32 numpy arrays; transposed views of the given ones where those are
      float32.
    Raises:
      UserError: tensors missing, unexpected, misshapen (all listed) or not finite.
    """
    return to_params(
        select(state_dict).tensors,
        rename_table(config),
        check_finite=check_finite,
        progress=progress,
    )


def to_torch(params: Params, config: BertConfig) -> dict[str, np.ndarray]:
    """Converts parameters to a state dict that transformers' BertModel loads.

    The pooler, which a BertModel may have besides, was never read.

    Raises:
      UserError: parameters missing, unexpected or misshapen; all are listed.
    """
    return to_tensors(params, rename_table(config))


def config_from_dict(fields: Mapping[str, Any]) -> BertConfig:
    """Returns a BertConfig from the fields of a model folder's config.json.

    Raises:
      UserError: a field that BertConfig does not have.
    """
    return config_from_fields(BertConfig, fields)


def config_json(config: BertConfig) -> dict[str, Any]:
    """Returns the config.json that transformers' BertModel.from_pretrained reads."""
    names = {theirs: getattr(config, ours) for ours, theirs in BERT_NAMES.items()}
    theirs = next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)
    required = {name: values[0] for name, values in BERT_ONLY.items()}
    return {"architectures": ["BertModel"], "hidden_act": theirs, **required, **names}


def describe(config: BertConfig) -> str:
    """Describes a config in one line."""
    return (
        f"{config.layers} layers of width {config.width}, {config.heads} heads, feed-forward "
        f"{config.ffn}, {config.activation}, {config.max_tokens} tokens"
    )


@functools.lru_cache(maxsize=32)
def rename_table(config: BertConfig) -> Sequence[Entry]:
    """Every tensor of the encoder with the parameter it is."""
    ids = jax.ShapeDtypeStruct((1, config.max_tokens), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, bool)
    return tuple(build_table(RULES, abstract_params(Bert(config), ids, mask)))


def load_encoder(
    folder: str | Path,
    name: str | None = None,
    *,
    tokenizer: str | None = None,
    max_tokens: int | None = None,
    dtype: str | None = None,
    batch: int = BATCH,
    **options: Any,
) -> BertEncoder:
    """Returns the encoder of a model folder made by `python -m convert --kind=bert`.

    Args:
      name: what data and models carry to find it again; by default the weights' checksum.
      tokenizer: folder of its tokenizer.json; None: only ids can be encoded.
      max_tokens: length to which texts are padded and cut; None keeps the model's own.
      dtype: type of the computation; None keeps the model's own.
      batch: texts the encoder takes at once.
      options: `sharding` and `verify`, as for microdit_jax.checkpoints.model_folder.load_model.
    Raises:
      UserError: not a model folder of this kind, or damaged, or no tokenizer there.
    """
    found = open_folder(folder, KIND.name, **options)
    config = config_from_dict(found.config)
    changes = {"dtype": dtype, "max_tokens": max_tokens}
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
    words = BertTokenizer(tokenizer, config.max_tokens) if tokenizer else None
    return BertEncoder(name or found.name, config, found.params, words, batch=batch)


def _sizes(tensors: Mapping[str, Any]) -> dict[str, int]:
    """Reads BertConfig's sizes off the tensors' shapes."""
    names = (
        _WORDS,
        "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        f"{_LAYER}.0.intermediate.dense.weight",
    )
    (vocab_size, width), (positions, _), (types, _), (ffn, _) = matrix_shapes(
        tensors, names, "a BERT"
    )
    return {
        "width": width,
        "layers": count_blocks(tensors, _LAYER),
        "ffn": ffn,
        "vocab_size": vocab_size,
        "positions": positions,
        "types": types,
    }


KIND = Kind(
    name="bert",
    part=None,  # its files hold it under its own names
    infer_config=infer_config,
    from_torch=from_torch,
    to_torch=to_torch,
    config_from_dict=config_from_dict,
    describe=describe,
    select=select,
    config_json=config_json,
    options=("max_tokens",),
    config_keys=("type_vocab_size",),
    stems=("model", "pytorch_model"),
    tokenizer_files=(TOKENIZER,),
)
