"""Errors of collectives: which ones another process's end may have caused, and in which words."""

import re

from microdit_jax.errors import Late, visible
from microdit_jax.machine.coordination import Unreachable

_NETWORK = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|Connection (reset|closed|refused)")

_BROKEN = re.compile(r"Gloo \w+ failed|NCCL \w+ (failed|error)")


def is_of_another(error: BaseException) -> bool:
    """Returns True if another process's end may have caused the error: collectives that broke."""
    found: BaseException | None = error
    while found is not None:
        text = str(found)
        # By name: the class has moved between versions of JAX. An array that a broken collective
        # was to give raises ValueError where it is read, as a save does.
        if type(found).__name__ in ("JaxRuntimeError", "XlaRuntimeError") or (
            isinstance(found, ValueError) and _BROKEN.search(text)
        ):
            return not ("RESOURCE_EXHAUSTED" in text or "timed out task names" in text)
        if isinstance(found, Unreachable):
            return True
        found = found.__cause__ or found.__context__
    return False


def named(error: Exception, goes_on: str) -> Exception:
    """Returns what to tell of an error that is of another, of whom nothing was heard.

    A library waits for others less long than the watch does, or a cable between two hosts broke.
    What speaks of no network is returned as it is: a defect.

    Args:
      goes_on: from where the same command goes on.
    """
    if not _NETWORK.search(str(error)):
        return error
    line = visible(str(error).splitlines()[0], 200)
    return Late(
        f"expected all processes in a collective, found none gone, but {line}; where that comes "
        f"again, look at the network between the hosts; {goes_on}"
    )
