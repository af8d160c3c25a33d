"""Standard output and error that never fail: a command's work does not depend on who reads.

What a reader that went away (`| head -1`) or a closed stream would have got is dropped. A
character that the terminal cannot show is written as its escape, such as \\u2603; so is one that
the terminal would act upon, whatever file or host a text came from. Of those only line ends, tabs
and what moves a progress bar pass.
"""

import contextlib
import io
import os
import re
import socket
import sys
import time
from typing import TextIO

from microdit_jax.errors import escaped

# tqdm goes to the line's begin by the first character of what it writes, and between bars in writes
# of their own.
_LOGS_KEPT = 100  # files of libraries' messages; older ones are deleted
_BEGIN_OF_LINE, _BETWEEN_BARS = re.compile("\r*"), re.compile(r"(\n|\r|\x1b\[A)*")


class _Stream(io.TextIOWrapper):
    """A text stream that goes to /dev/null after its first failure.

    Attributes:
      lost: what that failure was.
      in_a_line: True where the last line that was written has no end yet, as a progress bar's.
    """

    lost: OSError | None = None
    in_a_line = False

    def write(self, text: str, /) -> int:
        self.in_a_line = not text.endswith("\n") if text else self.in_a_line
        try:
            super().write(_shown(_with_urls(text)))
            return len(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = self.lost or error
        # In place of the file itself, so that what the stream still holds can be written, and
        # C++ writes there too.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def _with_urls(text: str) -> str:
    """Puts URLs in the place of local paths; where their module was not needed, there are none."""
    urls = sys.modules.get("microdit_jax.files.urls")
    return text if urls is None else urls.with_urls(text)


def _shown(text: str) -> str:
    if text.isprintable() or _BETWEEN_BARS.fullmatch(text):
        return text
    begin = _BEGIN_OF_LINE.match(text)
    assert begin is not None  # it matches any text
    return begin[0] + escaped(text[begin.end() :], keep="\n\t")


def protect() -> None:
    """Makes sys.stdout and sys.stderr streams that never fail and write each line at once."""
    os.environ["PYTHON_COLORS"] = "0"  # argparse and traceback of Python 3.13 on; also NO_COLOR's
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened must not take this number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _protected(sys.stdout, 1), _protected(sys.stderr, 2)


def divert_libraries() -> str:
    """Sends what C++ libraries write to standard error into a file, and returns its path.

    sys.stderr stays where it is. A collective that breaks, or a service that ends, says so on pages
    of C++; the last line that a person sees is the command's own. Returns "" where no file can be
    written: then nothing changes.
    """
    from microdit_jax.files import cache_folder

    try:
        folder = cache_folder() / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.glob("*.txt"))[:-_LOGS_KEPT]:
            old.unlink(missing_ok=True)
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}.txt"
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except (OSError, RuntimeError):  # no home, a full disk
        return ""
    sys.stderr.flush()
    sys.stderr = _protected(sys.stderr, os.dup(2))
    os.dup2(log, 2)
    os.close(log)
    return str(path)


def _protected(stream: TextIO | None, number: int) -> TextIO:
    encoding = "utf-8"
    if stream is not None:
        stream.flush()
        encoding = stream.encoding
    with contextlib.suppress(OSError):
        os.set_blocking(number, True)  # else a slow terminal would seem to fail
    # Line by line even into a file: nothing is lost when the process ends from one moment to the
    # next, and a log can be followed.
    return _Stream(
        io.BufferedWriter(io.FileIO(number, "w", closefd=False)),
        encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def lost() -> OSError | None:
    """Returns why lines of standard output were lost; None where all were written.

    A reader that went away on purpose (`| head -1`) is no loss.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    error = getattr(sys.stdout, "lost", None)
    return None if isinstance(error, BrokenPipeError) else error
