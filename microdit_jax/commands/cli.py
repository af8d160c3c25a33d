"""What every command shares: one line and exit status 2 for bad input, the compilation cache."""

import collections
import re
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from microdit_jax.commands.parser import exit_on_user_error
from microdit_jax.errors import UserError
from microdit_jax.files import cache_folder, shipped

HELP = frozenset({"?", "h", "help", "helpshort", "helpfull", "helpxml"})  # absl's flags


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told where already."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.monitoring.register_event_listener(_count_event)


_EVENTS = collections.Counter()


def _count_event(event: str, **_) -> None:
    _EVENTS[event] += 1


def compiled_programs() -> str:
    """What XLA had to do since this process started, to end a line of a report."""
    compiled = _EVENTS["/jax/compilation_cache/cache_misses"]
    found = _EVENTS["/jax/compilation_cache/cache_hits"]
    return f"; {compiled} programs compiled, {found} from the cache"


def run(main: Callable[[list[str]], None]) -> None:
    """absl's app.run, with one line instead of a traceback for what a person can mend."""

    def parse(argv: list[str]) -> list[str]:
        argv = _with_installed_configs(argv)
        try:
            return flags.FLAGS(argv)
        except SystemExit:
            if HELP.isdisjoint(argument.lstrip("-") for argument in argv):
                raise  # a configuration's own
            raise SystemExit(0) from None  # absl ends these with 1
        # What absl and ml_collections raise for flags, files, keys and values they cannot take
        except (flags.Error, LookupError, AttributeError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{_last_words(error, argv)}; see {argv[0]} --help") from error

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every rename
        use_compilation_cache()
        with exit_on_user_error():
            try:
                main(argv)
            except app.UsageError as error:  # absl would print all of --help
                raise UserError(f"{error}; see {argv[0]} --help") from error

    with exit_on_user_error():
        app.run(guarded, flags_parser=parse)


def read_config(holder: flags.FlagHolder) -> ConfigDict:
    """The configuration of a --config flag.

    Raises:
      UserError: there is no such file (ml_collections says so only when the flag is read).
    """
    config = holder.value
    try:
        config.keys()
    except OSError as error:
        raise UserError(
            "--config must be a Python file with get_config, such as configs/demo.py, found none "
            "there; ls configs/"
        ) from error
    return config


def _with_installed_configs(argv: list[str]) -> list[str]:
    """--config=configs/NAME.py is the file of the package where the current folder has none."""
    found = []
    for argument in argv:
        flag, divider, value = argument.rpartition("=configs/")
        name = value.split(":")[0]
        if divider and flag.lstrip("-") == "config" and not Path("configs", name).exists():
            if (shipped("configs") / name).is_file():
                argument = f"{flag}={shipped('configs')}/{value}"
        found.append(argument)
    return found


def _last_words(error: Exception, argv: list[str]) -> str:
    """The reason at the end of ml_collections' message, which may be a whole traceback."""
    missing = re.search(r"flag --(\w+)=None", str(error))
    if missing:
        return f"--{missing[1]} must be given, found none"
    unknown_key = re.search(r"'(\w+)[\\\\']", str(error)) if "flag" not in str(error) else None
    if not unknown_key:
        return str(error).strip().splitlines()[-1].split("UserError: ")[-1].strip()
    key, given = unknown_key[1], "\0".join(argv)
    file = re.search(r"-config[=\0]([^\0]+)", given)
    if file and re.search(rf"-config\.{key}\b", given):
        config = flags.FLAGS["config"].parser.parse(file[1])  # as it is without the flags after it
        if "stages" in config:
            return (
                f"unknown config key {key!r}, {file[1]} is a chain of stages; give "
                f"--config.STAGE.{key}, with STAGE one of {', '.join(config.stages)}"
            )
    return f"unknown config key {key!r}, microdit_jax/training/defaults.py has all"
