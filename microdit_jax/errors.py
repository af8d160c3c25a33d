"""The one exception that users are meant to see, and who raises and catches it in commands."""

import argparse
import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """Input that a person can mend: what was expected, what was found, and the fix, in one line.

    Commands turn it into that line on stderr and exit status 2; the library raises it unchanged.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


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


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike, num_bytes: int = 0) -> Iterator[None]:
    """Turns a full disk, or a place that may not be written, into a UserError about `path`.

    Args:
      num_bytes: how much will be written; refused at once when the disk has less free.
    """
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{path} needs {num_bytes / 1e9:.2f} GB, found {free / 1e9:.2f} GB free on its disk; "
            "free some space or choose another place"
        )
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = "free some space or choose another place"
        # The last three: a file where a folder is needed, and the other way round.
        elif error.errno in (
            errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
        ):  # fmt: skip
            fix = "choose a place you may write to"
        else:
            raise
        raise UserError(f"could not write {path}: {error.strerror}; {fix}") from error
