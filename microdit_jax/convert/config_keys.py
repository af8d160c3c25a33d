"""Accounts for every key of another library's config file: used, without effect, or refused.

A key that nobody knows may change what the network computes, so it is an error that names it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from microdit_jax.errors import UserError, visible


@dataclasses.dataclass(frozen=True)
class Keys:
    """Knowledge of the keys in one part of a config file.

    Attributes:
      file: the file's name, for errors.
      model: what the file describes, for errors: "CLIP".
      part: name of this part within the file; "" for the file itself.
      used: keys that the caller reads.
      without_effect: keys that change nothing here.
      only: key -> the values that are supported; None stands for a key that is not there.
      plain: says for errors of what kind a model without the keys in `only` is.
    """

    file: str
    model: str
    part: str = ""
    used: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    plain: str = ""

    def check(self, given: Any) -> Mapping[str, Any]:
        """Returns the part of the config as it is.

        Raises:
          UserError: a key that is unknown, or has a value that is not supported; or no JSON object.
        """
        if not isinstance(given, Mapping):
            where = f"under {self.part} in {self.file}" if self.part else f"in {self.file}"
            raise UserError(
                f"expected a JSON object {where}, found {visible(repr(given), 60)}; correct it"
            )
        for key, value in given.items():
            if key in self.only:
                if not any(_same(value, only) for only in self.only[key]):
                    self.refuse(key, value, self._wanted(key))
            elif key not in self.used and key not in self.without_effect:
                self.refuse(key, value, "left out, as its effect is not known")
        return given

    def _wanted(self, key: str) -> str:
        stated = [repr(value) for value in self.only[key] if value]
        return f"as {' or '.join(stated)}" if stated else f"left out{self.plain}"

    def refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        """Raises UserError for a key's value; `wanted` says which would be supported."""
        where = f"{self.part} of {self.file}" if self.part else self.file
        raise UserError(
            f"expected {visible(key, 60)} {wanted} in {where}, found {visible(key, 60)} "
            f"{visible(value, 60)}; this {self.model} is not supported"
        )


def _same(value: Any, only: Any) -> bool:
    """True for equal JSON values: 0 and false are two."""
    return value is only or (value == only and isinstance(value, bool) == isinstance(only, bool))
