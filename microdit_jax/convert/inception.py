"""Converts the FID network between the public PyTorch port of Inception-v3 and our parameters."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from microdit_jax.convert.arguments import config_from_fields, shape_of
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
from microdit_jax.errors import UserError
from microdit_jax.metrics.inception import WIDTH, InceptionConfig, make_inception

_FIRST, _LAST = "Conv2d_1a_3x3.conv.weight", "fc.weight"
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _dotted(match: re.Match) -> str:
    return match[1].replace("/", ".")


# exact: the _1 of branch5x5_1 is part of a name and no index of a list.
RULES = [
    Rule(r"(.*)/conv/kernel", lambda m: f"{_dotted(m)}.conv.weight", CONV, exact=True),
    Rule(r"(.*)/bn/(\w+)", lambda m: f"{_dotted(m)}.bn.{_NORM[m[2]]}", exact=True),
    Rule(r"fc/kernel", "fc.weight", LINEAR),
    Rule(r"fc/bias", "fc.bias"),
]


def select(state_dict: Mapping[str, Any]) -> StateDict:
    """Leaves out the counters of training batches that PyTorch adds to batch norms."""
    tensors = {k: v for k, v in state_dict.items() if not k.endswith(".num_batches_tracked")}
    counters = len(state_dict) - len(tensors)
    return StateDict(tensors, [f"ignored {counters} num_batches_tracked"] if counters else [])


def infer_config(state_dict: Mapping[str, Any]) -> InceptionConfig:
    """Returns the config of the network whose state dict this is.

    Raises:
      UserError: not an Inception-v3, or torchvision's, which is another network.
    """
    first, last = shape_of(state_dict, _FIRST), shape_of(state_dict, _LAST)
    if (len(first), len(last)) != (4, 2) or WIDTH % max(1, first[0]):
        found = ", ".join(list(state_dict)[:3]) or "no tensor"
        raise UserError(
            f"expected Inception-v3 with {_FIRST} and {_LAST}, found {len(state_dict)} tensors "
            f"({found}, ...); give pt_inception-2015-12-05-6726825d.pth"
        )
    if any(name.startswith("AuxLogits") for name in state_dict):
        raise UserError(
            "expected the FID network of 2015, found torchvision's Inception-v3 with its auxiliary "
            "head; give pt_inception-2015-12-05-6726825d.pth, other weights give another FID"
        )
    return InceptionConfig(classes=last[0], divisor=WIDTH // first[0])


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    config: InceptionConfig,
    *,
    check_finite: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Params:
    """Converts the public state dict to parameters of `Inception`, batch statistics included.

    Raises:
      UserError: tensors missing, unexpected, misshapen (all listed) or not finite.
    """
    tensors = select(state_dict).tensors
    return to_params(tensors, rename_table(config), check_finite=check_finite, progress=progress)


def to_torch(params: Params, config: InceptionConfig) -> dict[str, np.ndarray]:
    """Converts parameters of `Inception` to a state dict, views wherever possible.

    Raises:
      UserError: parameters missing, unexpected or misshapen; all are listed.
    """
    return to_tensors(params, rename_table(config))


def config_from_dict(fields: Mapping[str, Any]) -> InceptionConfig:
    """Returns an InceptionConfig from the fields of a model folder's config.json."""
    return config_from_fields(InceptionConfig, fields)


def describe(config: InceptionConfig) -> str:
    """Describes a config in one line."""
    return f"Inception-v3 for FID, {2048 // config.divisor} features, {config.classes} classes"


@functools.lru_cache(maxsize=8)
def rename_table(config: InceptionConfig) -> Sequence[Entry]:
    """Every parameter of the network with its torch name, both shapes and the transform."""
    pixels = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    return tuple(build_table(RULES, abstract_params(make_inception(config), pixels)))


KIND = Kind(
    name="inception",
    part="inception",
    infer_config=infer_config,
    from_torch=from_torch,
    to_torch=to_torch,
    config_from_dict=config_from_dict,
    describe=describe,
    select=select,
)
