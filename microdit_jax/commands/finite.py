"""Numbers among a command's flags: NaN and infinity are refused before any work."""

import math
from collections.abc import Mapping
from typing import Any

from microdit_jax.errors import UserError


def check_finite(values: Mapping[str, Any]) -> None:
    """Refuses flags whose number is no finite one.

    Comparisons with NaN are all false, so that a check of a range lets it pass, or a wait for it
    never ends. Keys of a config have rules of their own (training.rules), some of which allow them.

    Args:
      values: by the flags' names; those that are no floats are left alone.
    Raises:
      UserError: a flag is NaN or infinite.
    """
    for name, value in values.items():
        ours = isinstance(value, float) and not name.startswith("config.")
        if ours and not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, found {value}")
