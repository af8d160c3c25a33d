"""The one place where commands begin and end: every failure is one line there, and a status.

| what happened | status |
|---|---|
| done, also where nobody read the output to its end (`| head -1`) | 0 |
| a defect of ours; the line says where the traceback was written | 1 |
| what a person can mend: bad input, a path, memory, a JAX that cannot start, lost output | 2 |
| a training run that has saved and stopped by a signal before its end, or a process of the job is |
| gone or came late; the same command goes on | 75 |
| Ctrl-C, SIGTERM, SIGHUP elsewhere; the same command goes on | 130, 143, 129 |

A command's module begins with these lines, and so runs inside of the boundary from its own imports
on. Its `main` takes the arguments without the program's name.

    if __name__ == "__main__":
        from microdit_jax.commands.boundary import run_command

        run_command("microdit_jax.evaluate.__main__")
"""

import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from microdit_jax.commands import output
from microdit_jax.errors import LONGEST, MORE, Late, UserError, escaped, visible
from microdit_jax.machine import interrupts

_program = ""


def run_command(target: str) -> NoReturn:
    """Runs the command of a module, given by its name or its file, and ends the process.

    Only called when the process is this command's: it takes over signals, standard output and
    error, and what happens to exceptions that nobody catches.
    """
    global _program
    output.protect()
    interrupts.install()
    _program = _program_name()
    # multiprocessing's helper process frees the locks that os._exit leaves, those of progress bars,
    # and would say so after our last line (Python 3.14 on Linux, any on macOS).
    sys.warnoptions.append("ignore:resource_tracker")
    threading.excepthook = lambda args: _tell_of_thread(args.exc_value)
    sys.unraisablehook = lambda args: _tell_of_ignored(args.exc_value)
    status = outcome(lambda: _load(target).main(sys.argv[1:]), sys.argv[1:])
    interrupts.leaving()
    if error := output.lost():
        _say(f"error: the output was lost: {_reason(error)}; send it elsewhere")
        status = status or 2
    if status:
        os._exit(status)  # at once: threads may still compile, and other processes may wait for us
    sys.exit(0)


def program(default: str = "") -> str:
    """Returns how this command was called, for a hint such as "see ... --help".

    Args:
      default: the answer where no command was called, as in tests and notebooks.
    """
    return _program or default


def outcome(work: Callable[[], None], arguments: Sequence[str] = ()) -> int:
    """Runs a command's work and returns its exit status, having told any failure in one line."""
    try:
        _check_surroundings(arguments)
        work()
        return 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        _say(str(error.code))
        return 1
    except BaseException as error:
        # After a signal whatever is raised was raised because of it.
        number = interrupts.received() or (isinstance(error, KeyboardInterrupt) and signal.SIGINT)
        if number:
            _say(interrupts.STOPPED)
            return interrupts.status_if_stopped(128 + number)
        status, line = describe(error)
        _say(line)
        return status


def describe(error: BaseException) -> tuple[int, str]:
    """Returns the exit status and the line for an exception that ended a command."""
    if isinstance(error, Late):
        return interrupts.STOPPED_EARLY, str(error)
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        whose = "memory" if isinstance(error, MemoryError) else "memory of the device"
        return 2, f"error: out of {whose}: {_reason(error)}; ask for less at a time; {MORE}"
    if isinstance(error, OSError):
        return 2, f"error: {_reason(error)}; check that path, or give another"
    if isinstance(error, ImportError) and not (error.name or "").startswith("microdit_jax"):
        return 2, (
            f"error: {_reason(error)}; install the packages that this one needs: pip install "
            "--upgrade microdit_jax"
        )
    if fault := _why_jax_does_not_start():
        wanted = os.environ.get("JAX_PLATFORMS")
        return 2, (
            f"error: JAX cannot start{f' with JAX_PLATFORMS={wanted}' if wanted else ''}: {fault}; "
            "install its part for this machine (pip install 'microdit_jax[cuda12]', [cuda13] or "
            "[tpu]; a GPU's driver must be as new as that), or set JAX_PLATFORMS=cpu; "
            f"{MORE}"
        )
    return 1, _defect(error)


# ------------------------------------------------------------------ the beginning
def _program_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    name = os.path.basename(sys.argv[0])
    return f"python {sys.argv[0]}" if name.endswith(".py") else name


def _load(target: str) -> ModuleType:
    """Imports a module by its name, or by its file where that ends in ".py"."""
    if not target.endswith(".py"):
        return importlib.import_module(target)
    name = os.path.splitext(os.path.basename(target))[0]
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _check_surroundings(arguments: Sequence[str]) -> None:
    """Raises UserError where the folder or the encoding that a command starts in cannot work."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the current folder is gone ({error.strerror}); change to one that exists"
        ) from error
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"expected arguments in UTF-8, found {argument!r}; type it in a terminal whose "
                "encoding is UTF-8 (LC_ALL=C.UTF-8), or rename the file"
            ) from error


# ------------------------------------------------------------------ the end
def _say(line: str) -> None:
    """Writes one line to stderr: line ends and control characters show as what they are."""
    joined = " ".join(part.strip() for part in line.splitlines() if part.strip())
    shown = visible(joined, LONGEST)
    if getattr(sys.stderr, "in_a_line", False):  # a progress bar's
        print(file=sys.stderr)
    print(shown, file=sys.stderr, flush=True)


def _reason(error: BaseException) -> str:
    """Returns what an exception says, on one line, with the paths of the file system's."""
    if isinstance(error, OSError) and error.strerror:
        paths = [
            os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, str | bytes)
        ]
        return f"{' -> '.join(paths)}: {error.strerror}" if paths else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _why_jax_does_not_start() -> str:
    """Returns why JAX finds no device; "" where it does, or where the command had no use for it."""
    jax = sys.modules.get("jax")
    if jax is None:
        return ""
    try:
        jax.devices()
    except Exception as error:
        return "no such platform is installed" if not str(error) else _reason(error)
    return ""


def _defect(error: BaseException) -> str:
    """Writes the traceback to a file and returns the line that says so."""
    import tempfile
    import time
    import traceback
    from pathlib import Path

    from microdit_jax import __version__
    from microdit_jax.files import cache_folder

    # What it quotes is from outside: whoever looks at the file does so in a terminal.
    text = escaped("".join(traceback.format_exception(error)), keep="\n\t")
    about = f"microdit_jax {__version__}, Python {sys.version}\n{sys.argv}\n\n{text}"
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    places = [lambda: cache_folder() / "defects", lambda: Path(tempfile.gettempdir())]
    told = "its traceback could not be written"
    for place in places:
        try:
            path = place() / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(about, errors="backslashreplace", encoding="utf-8")
        except (OSError, RuntimeError):  # no home, a full disk
            continue
        told = f"its traceback is in {path}"
        break
    return (
        f"this is a defect of microdit_jax: {_reason(error)}; {told}; report it with that file and "
        "the command"
    )


def _tell_of_thread(error: BaseException | None) -> None:
    if error is not None and interrupts.received() is None and not isinstance(error, SystemExit):
        _say(f"a thread ended early; {_defect(error)}")


def _tell_of_ignored(error: BaseException | None) -> None:
    """Ends the process where Python would ignore a signal's exception, as in a callback."""
    if isinstance(error, interrupts.Stopped):
        interrupts.end(error.number)
    # Orbax closes its loop at a save's first error, while other writes are still on their way.
    if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
        return
    if error is not None and interrupts.received() is None:
        _say(f"an exception was ignored; {_defect(error)}")
