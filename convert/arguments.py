"""How the commands read their flags, and the kinds of model the fields of their configs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from microdit_jax.errors import Parser, UserError

__all__ = ["Parser", "config_from_fields", "size_faults"]

Config = TypeVar("Config")


def config_from_fields(cls: type[Config], fields: Mapping[str, Any]) -> Config:
    """The config dataclass `cls` from the fields of a JSON file.

    Raises:
      UserError: a field that `cls` does not have.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise UserError(
            f"expected fields of {cls.__name__} ({', '.join(known)}), found {', '.join(unknown)}; "
            "correct or remove them"
        )
    return cls(**fields)


def size_faults(given: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """What a config states otherwise than the tensors have it, each in words.

    Args:
      given: the config's fields; those that it lacks are no fault.
      sizes: as the tensors' shapes have them.
    """
    return [
        f"{name} {given[name]} (the tensors have {size})"
        for name, size in sizes.items()
        if given.get(name, size) != size
    ]
