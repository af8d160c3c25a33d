"""What every command shares: one line and exit status 2 for bad input, the compilation cache."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging

from microdit_jax.errors import UserError, exit_on_user_error


def cache_folder() -> Path:
    """The user's cache folder of this project."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "microdit_jax"


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told where already."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def run(main: Callable[[list[str]], None]) -> None:
    """absl's app.run, with one line instead of a traceback for what a person can mend."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            raise UserError(f"{error}; see {argv[0]} --help") from error
        # ml_collections' errors for a config file or key that is not there
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{error}; see {argv[0]} --help and configs/common.py") from error

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every rename
        use_compilation_cache()
        with exit_on_user_error():
            main(argv)

    if any(flag in ("--help", "-h", "-help", "--helpfull") for flag in sys.argv[1:]):
        print(sys.modules["__main__"].__doc__.strip() + "\n")
    with exit_on_user_error():
        app.run(guarded, flags_parser=parse)
