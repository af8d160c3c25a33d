"""How the commands read their flags, and the kinds of model the fields of their configs."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from microdit_jax.errors import UserError

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors that name its --help."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


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
