"""Commands with absl's flags: reading them, --help, keeping compiled programs."""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from microdit_jax.commands import boundary
from microdit_jax.commands.config_file import as_config_file, read_config
from microdit_jax.commands.finite import check_finite
from microdit_jax.commands.paths import check_stores, local_places
from microdit_jax.errors import UserError


def absl_command(
    *, required: Sequence[str] = (), words: str = "all values go into flags"
) -> Callable[[Callable[[], None]], Callable[[Sequence[str]], None]]:
    """Turns a function that reads absl's flags into a command's `main` (commands.boundary).

    The command prints the docstring of its module and its key flags for --help, and keeps compiled
    programs between runs.

    Args:
      required: names of the flags that must be given.
      words: where an argument that is no flag belongs, for the error.
    """

    def decorate(main: Callable[[], None]) -> Callable[[Sequence[str]], None]:
        module = sys.modules[main.__module__]

        def work(rest: list[str]) -> None:
            if len(rest) > 1:
                raise _bad_arguments(f"unexpected arguments {rest[1:]}; {words}")
            for name in required:
                if flags.FLAGS[name].value is None:
                    raise _bad_arguments(f"--{name} must be given, found none")
            check_finite(flags.FLAGS.flag_values_dict())
            check_stores(module.__name__, flags.FLAGS.flag_values_dict())
            logging.set_verbosity(logging.WARNING)  # Orbax tells every rename
            from microdit_jax.machine import compilation_cache  # half a second, not for --help

            compilation_cache.enable()
            with local_places(module.__name__, flags.FLAGS.flag_values_dict()) as local:
                for name, path in local.items():
                    flags.FLAGS[name].value = path
                main()

        @functools.wraps(main)
        def command(arguments: Sequence[str]) -> None:
            sys.argv[1:] = arguments  # where ml_collections looks for what overrides a config
            _define_help(module)
            app.run(work, [sys.argv[0], *arguments], flags_parser=parse_flags)

        return command

    return decorate


def parse_flags(argv: list[str]) -> list[str]:
    """Reads absl's flags and returns the arguments that are none.

    Args:
      argv: the program's name first.
    Raises:
      UserError: an unknown flag or key of a config, or a value that it cannot take.
    """
    if "config" in flags.FLAGS:
        as_config_file(flags.FLAGS["config"])
    try:
        return flags.FLAGS(argv)
    except Exception as error:
        # absl and ml_collections raise all kinds, for flags, files, keys and values alike.
        for cause in _chain(error):
            if isinstance(cause, UserError):
                raise cause from None
        raise _bad_arguments(_last_words(error, argv)) from error


def _bad_arguments(message: str) -> UserError:
    return UserError(f"{message}; see {boundary.program(sys.argv[0])} --help")


def _chain(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _last_words(error: Exception, argv: list[str]) -> str:
    """Returns the reason in the message of absl or ml_collections, of which it is the end."""
    text = str(error)
    unknown_key = re.search(r"'(\w+)[\\\\']", text) if "flag" not in text else None
    if not unknown_key:
        return (text.strip().splitlines() or [type(error).__name__])[-1].strip()
    key, given = unknown_key[1], "\0".join(argv)
    file = re.search(r"-config[=\0]([^\0]+)", given)
    if file and re.search(rf"-config\.{key}\b", given):
        config = read_config(file[1])  # as it is without the flags after it
        if "stages" in config:
            return (
                f"unknown config key {key!r}, {file[1]} is a chain of stages; give "
                f"--config.STAGE.{key}, with STAGE one of {', '.join(config.stages)}"
            )
    return f"unknown config key {key!r}, microdit_jax/training/defaults.py has all"


# ------------------------------------------------------------------ --help
class _Help(flags.BooleanFlag):
    """A flag that prints the help when it is read, and ends the command well."""

    def __init__(self, name: str, module: Any, every_flag: bool, short_name: str | None = None):
        super().__init__(name, False, "Show this help.", short_name, allow_override=True)
        self._module, self._every_flag = module, every_flag

    def parse(self, argument: Any) -> None:
        """Prints the help unless the flag is given as false."""
        if not self._parse(argument):
            return
        every = flags.FLAGS.get_help()
        print(f"{(self._module.__doc__ or '').strip()}\n")
        print(every if self._every_flag else flags.FLAGS.module_help(self._module))
        raise SystemExit(0)


def _define_help(module: Any) -> None:
    """Replaces absl's own help, which looks for the flags of `__main__` and ends with status 1."""
    app.define_help_flags()
    for name, every_flag in (("help", False), ("helpshort", False), ("helpfull", True)):
        short = "?" if name == "help" else None
        flags.DEFINE_flag(_Help(name, module, every_flag, short))
