"""The argument parser of commands without a run configuration."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from microdit_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser for a module's command: texts as written, no abbreviations of flags.

    Its complaints are UserErrors that name its --help.
    """

    def __init__(self, module: str, description: str, epilog: str | None = None):
        super().__init__(
            f"python -m {module}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError: what argparse could not take."""
        raise UserError(f"{message}; see {self.prog} --help")


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the process with status 2 and one line on stderr when a UserError reaches a command."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
