"""Configurations as Python files: --config=FILE.py, or --config=FILE.py:VARIANT.

A file that cannot be used is told by its name, the line and the reason.
"""

import os
import sys
import traceback
import types
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from microdit_jax.errors import UserError
from microdit_jax.files import shipped
from microdit_jax.files.urls import check_local

_MOST_BYTES = 2**24
WANTED = "a Python file with get_config, such as configs/demo.py"


def as_config_file(flag: flags.Flag) -> None:
    """Makes ml_collections' flag for a configuration read it with `read_config`."""
    if not isinstance(flag.parser, _Parser):
        flag.parser = _Parser()


class _Parser(flags.ArgumentParser):
    def parse(self, argument: str) -> ConfigDict:
        return read_config(argument)


def read_config(path: str) -> ConfigDict:
    """Returns the locked configuration of a file.

    Args:
      path: the file, with ":" and an argument for its get_config where it takes one. What begins
        with "configs/" is the installed file where the current folder has none.
    Raises:
      UserError: no such file, no Python, no get_config, another return value, or any exception
        that the file raises, with its line.
    """
    check_local(path)
    name, _, variant = path.partition(":")
    file = installed(name)
    module = types.ModuleType("microdit_jax_config")
    module.__file__ = file  # configs find their siblings by it
    sys.modules[module.__name__] = module  # where dataclasses look for it
    try:
        # Not by Python's own loader, which would leave a __pycache__ beside the file.
        with open(file, "rb") as opened:
            source = opened.read(_MOST_BYTES)  # a device such as /dev/zero has no end
        exec(compile(source, file, "exec"), module.__dict__)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config must be {WANTED}, found none in {name}; define it there")
        config = module.get_config(*([variant] if ":" in path else []))
    except UserError:
        raise
    except Exception as error:
        here = _line(error, file)
        if isinstance(error, OSError) and not here:
            raise UserError(
                f"--config must be {WANTED}, found {error.strerror or error} at {name}; ls configs/"
            ) from error
        reason = error.msg if isinstance(error, SyntaxError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"--config must be {WANTED}, found {name}{here}: {reason}; correct the file"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config must be a file whose get_config returns an ml_collections.ConfigDict, found "
            f"{type(config).__name__} from {name}; return one"
        )
    return config.lock()


def installed(name: str) -> str:
    """Returns the package's own configs/NAME.py where the current folder has none."""
    folder, _, file = name.partition("configs/")
    if not folder and not Path(name).exists() and (shipped("configs") / file).is_file():
        return str(shipped("configs") / file)
    return name


def _line(error: Exception, file: str) -> str:
    """Returns ", line N" of the file where an exception passed through it; "" elsewhere."""
    if isinstance(error, SyntaxError) and error.lineno:
        other = error.filename and os.path.basename(error.filename) != os.path.basename(file)
        return f" ({error.filename}, line {error.lineno})" if other else f", line {error.lineno}"
    places = traceback.extract_tb(error.__traceback__)
    lines = [p.lineno for p in places if os.path.abspath(p.filename) == os.path.abspath(file)]
    return f", line {lines[-1]}" if lines else ""
