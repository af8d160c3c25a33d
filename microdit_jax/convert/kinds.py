"""Kinds of model that can be converted: one frozen dataclass of functions for each.

Each kind has a module of its name beside this one, which ends in `KIND = Kind(...)`. The modules
are imported when they are asked for, so that `python -m convert --help` is quick.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from microdit_jax.convert.arguments import MAX_SIZE, OTHER_KIND
from microdit_jax.convert.state_dict import StateDict
from microdit_jax.errors import UserError, visible

NAMES = ("dit", "vae", "clip_text", "clip", "t5", "bert", "inception")

Config = TypeVar("Config")
Tensors = Mapping[str, np.ndarray]


def keep_all(tensors: Tensors) -> StateDict:
    """Selects every tensor of a file."""
    return StateDict(dict(tensors), [])


@dataclasses.dataclass(frozen=True)
class Kind(Generic[Config]):
    """One kind of model: how its files are found, and the functions that convert it.

    Attributes:
      name: as --kind and a model folder's config.json have it.
      part: prefix of the model's tensors in a larger checkpoint; None if no checkpoint has one.
      infer_config: (tensors, **options) -> config, and `config_json=` if there are `config_keys`.
      from_torch: (tensors, config, progress=) -> parameters.
      to_torch: (parameters, config) -> tensors.
      config_from_dict: (fields of a model folder's config.json) -> config.
      describe: config -> one line.
      describe_origin: (inferred config, the flags given) -> where it comes from, in one line.
      select: (all tensors of a file) -> those of this model, and notes of what was left out.
      config_json: config -> contents of the config.json beside its torch weights; None: no file.
      options: flags that go to `infer_config`, if given.
      config_keys: a config.json of this kind has one of them, and goes to `infer_config`; empty if
        there is no such file: then --config holds the config's own fields.
      config_files: names of the config.json, the most telling one first.
      stems: names of the weights in a model's folder, without suffix, the best one first.
      subfolders: folders of a pipeline that may hold the model.
      tokenizer_files: names of the tokenizer's files, copied from beside the weights.
    """

    name: str
    part: str | None
    infer_config: Callable[..., Config]
    from_torch: Callable[..., dict[str, Any]]
    to_torch: Callable[[dict[str, Any], Config], dict[str, np.ndarray]]
    config_from_dict: Callable[[Mapping[str, Any]], Config]
    describe: Callable[[Config], str]
    describe_origin: Callable[[Config, Mapping[str, Any]], str] | None = None
    select: Callable[[Tensors], StateDict] = keep_all
    config_json: Callable[[Config], dict[str, Any]] | None = None
    options: tuple[str, ...] = ()
    config_keys: tuple[str, ...] = ()
    config_files: tuple[str, ...] = ("config.json",)
    stems: tuple[str, ...] = ()
    subfolders: tuple[str, ...] = ()
    tokenizer_files: tuple[str, ...] = ()

    def make_config(
        self, tensors: Tensors, given: dict[str, Any] | None, options: Mapping[str, Any]
    ) -> Config:
        """Returns the config of the model with these tensors.

        Args:
          given: contents of its config.json; for a kind without one, the config's fields.
          options: values of the kind's flags; None for those that were not given.
        Raises:
          UserError: the tensors, the config and the options do not go together.
        """
        stated = {name: value for name, value in options.items() if value is not None}
        large = [
            name for name, tensor in tensors.items() if max(tensor.shape, default=0) > MAX_SIZE
        ]
        if large:
            raise UserError(
                f"expected tensors of at most {MAX_SIZE:,} along an axis, found "
                f"{visible(large[0], 200)} of {tensors[large[0]].shape}; {OTHER_KIND}"
            )
        if self.config_keys:
            stated["config_json"] = given
        if self.config_keys or given is None:
            try:
                return self.infer_config(tensors, **stated)
            except (LookupError, ArithmeticError) as error:  # too few axes, sizes of zero
                raise UserError(
                    f"expected the shapes of a {self.name}, found others, from which its config "
                    f"cannot be told ({type(error).__name__}: {visible(error, 100)}); {OTHER_KIND}"
                ) from error
        if other := [name for name, value in stated.items() if given.get(name) != value]:
            has = ", ".join(f"{name} {visible(given.get(name), 60)}" for name in other)
            raise UserError(
                f"expected the config alone ({has}), found --{', --'.join(other)} too; put them "
                "into the config, or leave them out"
            )
        return self.config_from_dict(given)


def get_kind(name: str) -> Kind[Any]:
    """Returns the kind called `name`, one of NAMES, importing its module."""
    return importlib.import_module(f"microdit_jax.convert.{name}").KIND
