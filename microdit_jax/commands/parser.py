"""The argument parser of commands without a run configuration."""

import argparse
from typing import Any, NoReturn

from microdit_jax.commands import boundary
from microdit_jax.commands.finite import check_finite
from microdit_jax.commands.paths import check_stores
from microdit_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser for a module's command: texts as written, no abbreviations of flags.

    Its complaints are UserErrors that name its --help.
    """

    def __init__(self, module: str, description: str | None, epilog: str | None = None):
        super().__init__(
            boundary.program(f"python -m {module}"),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._module = module

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """Parses as argparse does; refuses NaN, infinity and URLs that the command cannot use."""
        found, rest = super().parse_known_args(*arguments, **options)
        check_finite(vars(found))
        check_stores(self._module, vars(found))
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Raises UserError with what argparse could not take."""
        raise UserError(f"{message}; see {self.prog} --help")
