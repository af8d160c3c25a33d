"""Gives commands to their real parsers, without running them: unknown flags and keys are errors.

Reads a JSON list of calls (the arguments after `python`) from stdin and writes, as JSON, what each
parser says against its call: "" for nothing. A process of its own, as flags are defined once in a
process; each call is parsed in a fork of it.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from microdit_jax.commands.scripts import SCRIPTS

SHARED = ("microdit_jax.convert.__main__", "microdit_jax.training.defaults")
OTHERS = ("pytest", "http.server", "venv", "pip")  # modules that are not ours


class Parsed(Exception):
    """The parser took all arguments: where the command's work would begin."""


def target(call: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the module or file that a call runs, "" for none of ours, and its arguments."""
    if call[:1] == ["-m"] and len(call) > 1:
        name = call[1]
        if name == "...":
            return "", []
        if name.startswith("microdit-"):
            name = SCRIPTS[name.removeprefix("microdit-")]
        return ("" if name in OTHERS else name), list(call[2:])
    if call and call[0].endswith(".py") and not call[0].startswith("tests/"):
        return call[0], list(call[1:])
    return "", []


def load(name: str) -> ModuleType:
    """Imports a command's module, up to its parser."""
    if name.endswith(".py"):
        return importlib.import_module(name.removesuffix(".py").replace("/", "."))
    if name == "convert":  # whose __main__ is two lines
        name = "microdit_jax.convert"
    name = name.removesuffix(".__main__")
    try:
        return importlib.import_module(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name not in (f"{name}.__main__", name):
            raise
        return importlib.import_module(name)


def parse(module: ModuleType, arguments: Sequence[str]) -> None:
    """Has a command's own parser take the arguments; raises what it raises."""
    parser, cli = argparse.ArgumentParser, sys.modules.get("microdit_jax.commands.cli")
    known = parser.parse_known_args

    def stop(self: argparse.ArgumentParser, args: object = None, namespace: object = None):
        _, rest = known(self, args, namespace)  # pyright: ignore[reportCallIssue]  # it is unbound
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed

    checked: Callable[..., None] | None = getattr(cli, "check_stores", None)

    def stop_after_stores(name: str, flags: object) -> None:
        assert checked is not None
        checked(name, flags)
        raise Parsed

    if hasattr(module, "parse_arguments"):  # with checks of its own
        module.parse_arguments(list(arguments))
        return
    parser.parse_args = stop  # pyright: ignore[reportAttributeAccessIssue]
    if cli is not None:
        cli.check_stores = stop_after_stores  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = [module.__name__, *arguments]
    takes_arguments = inspect.signature(module.main, follow_wrapped=False).parameters
    with contextlib.suppress(Parsed):
        module.main(list(arguments)) if takes_arguments else module.main()
        raise RuntimeError("the command did not stop after its parser")


def complaint(module: ModuleType, arguments: Sequence[str]) -> str:
    """Returns what a command's parser says against these arguments, from a fork; "" for nothing."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as pipe:
            said = pipe.read()
        return said if os.waitpid(child, 0)[1] == 0 else said or "the parser's process died"
    with os.fdopen(write, "w", encoding="utf-8") as pipe, contextlib.redirect_stderr(io.StringIO()):
        try:
            parse(module, arguments)
        except BaseException as error:
            pipe.write(re.sub(r"\s+", " ", f"{error}") or type(error).__name__)
    os._exit(0)


def main() -> None:
    """Parses each call of stdin's list in turn, those of a module together."""
    calls = json.load(sys.stdin)
    said = [""] * len(calls)
    for name in SHARED:  # imported once for all forks
        importlib.import_module(name)
    names = [target(call)[0] for call in calls]
    for name in dict.fromkeys(filter(None, names)):
        # A fork for each module too: two of them may define the same flag.
        read, write = os.pipe()
        if not (child := os.fork()):
            with os.fdopen(write, "w", encoding="utf-8") as pipe:
                mine = [i for i, other in enumerate(names) if other == name]
                try:
                    module = load(name)
                    found = {i: complaint(module, target(calls[i])[1]) for i in mine}
                except BaseException as error:
                    found = {i: f"{type(error).__name__}: {error}" for i in mine}
                json.dump(found, pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as pipe:
            for i, text in json.load(pipe).items():
                said[int(i)] = text
        os.waitpid(child, 0)
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
