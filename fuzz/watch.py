"""Notices what no file may do to the process that reads it."""

import codecs
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from microdit_jax.data import mapped
from microdit_jax.prepare.sources import column_process

FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.chmod",
    "os.chown",
    "os.symlink",
    "os.link",
    "os.kill",
    "os.putenv",
    "shutil.",
    "socket.",
    "ctypes.",
    "urllib.",
    "pickle.find_class",
    "code.",
    "exec",
    "import",
    "webbrowser.",
)
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Python's modules of them are imported when a text first needs them: JSON's and those of archives.
CODECS = ("ascii", "cp437", "latin-1", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be",
          "utf-32", "utf-32-le", "utf-32-be")  # fmt: skip
DTYPES = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float32, np.int64)


# What our own modules do by design, whatever the file: memory of a file that was opened by its
# checked name, and the process that decodes columns.
OWN_DOINGS = {
    "ctypes.cdata": mapped.__file__,
    "open": column_process.__file__,
    "subprocess.Popen": column_process.__file__,
}


class Escape(BaseException):
    """Something that a file did beyond being read; no reader's `except Exception` catches it."""


class Watch:
    """Audits the process while a file is read.

    Attributes:
      folder: the only one where files may be opened for writing.
    """

    def __init__(self, folder: Path):
        self.folder = os.path.realpath(folder)
        self._thread: int | None = None  # the one that reads; None: nobody does
        self._seen = ""
        self._state = self._globals()
        for codec in CODECS:
            codecs.lookup(codec)
        sys.addaudithook(self._audit)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raises Escape where the block did what no reader does."""
        self._thread, self._seen = threading.get_ident(), ""
        try:
            yield
        finally:
            self._thread = None
        if self._seen:
            raise Escape(self._seen)
        if (found := self._globals()) != self._state:
            raise Escape(f"globals changed: {self._state} became {found}")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._thread is None or self._thread != threading.get_ident():
            return
        if event in OWN_DOINGS and _is_called_by(OWN_DOINGS[event]):
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & CHANGES and not self._is_ours(path):
                self._tell(event, arguments)
        elif event.startswith(FORBIDDEN):
            self._tell(event, arguments)

    def _tell(self, event: str, arguments: tuple[Any, ...]) -> None:
        self._seen = f"{event} {ascii(arguments)[:300]}"
        raise Escape(self._seen)

    def _is_ours(self, path: Any) -> bool:
        if isinstance(path, int):  # a descriptor that was opened before
            return True
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder + os.sep)

    def _globals(self) -> tuple[Any, ...]:
        dtypes = [np.dtype(kind) for kind in DTYPES]
        kinds = tuple((d.itemsize, d.alignment, d.flags, d.char) for d in dtypes)
        return os.getcwd(), sys.getrecursionlimit(), kinds


def _is_called_by(file: str) -> bool:
    """Returns True if a module is among the nearest callers of an audited function."""
    frame = sys._getframe(2)
    for _ in range(6):
        if frame is None:
            return False
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back
    return False
