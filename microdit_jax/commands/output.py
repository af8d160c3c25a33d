"""Standard output and error that never fail: a command's work does not depend on who reads.

What a reader that went away (`| head -1`) or a closed stream would have got is dropped. A
character that the terminal cannot show is written as its escape, such as \\u2603.
"""

import io
import os
import select
import sys
from typing import TextIO


class _Output(io.FileIO):
    """A file descriptor whose failed writes count as done; `lost` is why the first one failed."""

    lost: OSError | None = None

    def write(self, data, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        view = memoryview(data)
        try:
            while (written := super().write(view)) is None:  # a terminal that is not blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            self.lost = self.lost or error
            return view.nbytes


def protect() -> None:
    """Makes sys.stdout and sys.stderr streams that never fail and write each line at once."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened must not take this number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _protected(sys.stdout, 1), _protected(sys.stderr, 2)


def _protected(stream: TextIO | None, number: int) -> TextIO:
    encoding = "utf-8"
    if stream is not None:
        stream.flush()
        encoding = stream.encoding
    raw = _Output(number, "w", closefd=False)
    # Line by line even into a file: nothing is lost when the process ends from one moment to the
    # next, and a log can be followed.
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=True
    )


def lost() -> OSError | None:
    """Returns why lines of standard output were lost; None where all were written.

    A reader that went away on purpose (`| head -1`) is no loss.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = getattr(raw, "lost", None)
    return None if isinstance(error, BrokenPipeError) else error
