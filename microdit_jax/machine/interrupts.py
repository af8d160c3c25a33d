"""Ctrl-C, SIGTERM and SIGHUP end a process soon and quietly, whatever its main thread does.

Python runs signal handlers in the main thread, between two of its own instructions: one that
compiles for a minute in C++ hears nothing, and a callback may swallow the exception. So a thread
watches too, and ends the process where the main thread has not done so in time.
"""

import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
GRACE_SECONDS = 1.5  # for the main thread to leave its `with` blocks
STOPPED = "stopped; the same command goes on"

_received: int | None = None
_leaving = False


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first signal; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def install() -> None:
    """Takes over the signals that this process does not ignore (nohup and `&` ignore some).

    A signal whose handler is replaced later belongs to who replaced it: a training loop that saves
    first (machine.signals), a web server that finishes its answers.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_release)
    threading.Thread(target=_watch, args=(reading,), name="interrupts", daemon=True).start()


def received() -> int | None:
    """Returns the number of the signal that asked this process to stop, None if none did."""
    return _received


def leaving() -> None:
    """Declares the command done: from now on a signal ends the process at once."""
    global _leaving
    _leaving = True


def end(number: int) -> NoReturn:
    """Ends the process here and now, with one line on stderr and the shell's status for a signal.

    Neither flushes nor cleans up: both could wait for a thread that holds a lock.
    """
    try:
        # After a progress bar (commands.output), or the ^C that a terminal shows.
        begun = getattr(sys.stderr, "in_a_line", False) or os.isatty(2)
        if select.select([], [2], [], 0.2)[1]:  # a pipe that nobody empties would block
            os.write(2, f"{chr(10) if begun else ''}{STOPPED}\n".encode())
    except OSError:
        pass  # nobody is there to be told
    os._exit(128 + number)


def _receive(number: int, frame: FrameType | None) -> None:
    global _received
    again, _received = _received is not None, number
    if again or _leaving or _importing(frame):
        end(number)
    raise Stopped(number)


def _importing(frame: FrameType | None) -> bool:
    """Returns True in the middle of an import, where an exception makes some C++ modules abort."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _watch(reading: int) -> None:
    """Ends the process some time after a signal that is ours, unless the main thread does."""
    while True:
        (number,) = os.read(reading, 1)
        if signal.getsignal(number) is _receive:
            time.sleep(GRACE_SECONDS)
            end(number)


def _release() -> None:
    """Gives a forked child its own signals back: it must not write into its parent's pipe."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _receive:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
