"""The one exception that users are meant to see."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Input that a person can mend: what was expected, what was found, and the fix, in one line.

    Commands turn it into that line on stderr and exit status 2; the library raises it unchanged.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the process with status 2 and one line on stderr when a UserError reaches a command."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
