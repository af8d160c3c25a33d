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
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, Protocol, runtime_checkable

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
GRACE_SECONDS = 1.5  # for the main thread to leave its `with` blocks
STOPPED = "stopped; the same command goes on"
STOPPED_EARLY = (
    75  # status of a run that stopped before its end, having saved (sysexits: try again)
)

_received: int | None = None
_leaving = False
_installed = False
_listener: "Listener | None" = None
_tell_others: Callable[[int], None] | None = None
_status_if_stopped: int | None = None


@runtime_checkable
class Listener(Protocol):
    """Decides about signals in place of this module, while it is set by `listen`."""

    def heard(self, number: int) -> float | None:
        """Returns after how many seconds to end the process; None never. Called in a thread."""
        ...

    def is_overdue(self) -> bool:
        """Returns True if the process must end now that those seconds have passed."""
        ...


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first signal; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def name_of(number: int) -> str:
    """Returns a signal's name, such as SIGTERM."""
    return signal.Signals(number).name


def install() -> None:
    """Takes over the signals that this process does not ignore (nohup and `&` ignore some).

    A signal whose handler is replaced later belongs to who replaced it: a training loop that saves
    first (machine.signals), a web server that finishes its answers.
    """
    global _installed
    _installed = True
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, receive)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_release)
    threading.Thread(target=_watch, args=(reading,), name="interrupts", daemon=True).start()


def installed() -> bool:
    """Returns True if this process's signals are watched (`install`)."""
    return _installed


def received() -> int | None:
    """Returns the number of the signal that asked this process to stop, None if none did."""
    return _received


def leaving() -> None:
    """Declares the command done: from now on a signal ends the process at once."""
    global _leaving
    _leaving = True


def listen(listener: Listener | None) -> None:
    """Sets who decides about signals whose handlers were replaced; None for nobody."""
    global _listener
    _listener = listener


def tell_others(tell: Callable[[int], None] | None) -> None:
    """Sets what is called with a signal's number before it ends this process (machine.watch)."""
    global _tell_others
    _tell_others = tell


def set_status_if_stopped(status: int | None) -> None:
    """Sets the exit status of a stop by a signal, for schedulers that take others for failures."""
    global _status_if_stopped
    _status_if_stopped = status


def status_if_stopped(default: int) -> int:
    """Returns the exit status of a stop by a signal: `default` unless another was set."""
    return default if _status_if_stopped is None else _status_if_stopped


def end(number: int) -> NoReturn:
    """Ends the process here and now, with one line on stderr and the shell's status for a signal.

    Neither flushes nor cleans up: both could wait for a thread that holds a lock.
    """
    if _tell_others is not None:
        _tell_others(number)
    end_with(STOPPED, status_if_stopped(128 + number))


def end_with(line: str, status: int) -> NoReturn:
    """Ends the process here and now, with this line on stderr; see `end`."""
    try:
        terminal = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        terminal = 2
    try:
        # After a progress bar (commands.output), or the ^C that a terminal shows.
        begun = getattr(sys.stderr, "in_a_line", False) or os.isatty(terminal)
        if select.select([], [terminal], [], 0.2)[1]:  # a pipe that nobody empties would block
            os.write(terminal, f"{chr(10) if begun else ''}{line}\n".encode(errors="replace"))
    except OSError:
        pass  # nobody is there to be told
    os._exit(status)


def receive(number: int, frame: FrameType | None) -> None:
    """Handles a signal, in the main thread: raises `Stopped`, or ends the process.

    Raises:
      Stopped: by the first signal.
    """
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
        if number not in SIGNALS:  # one that asks for something else, such as a profile
            continue
        if signal.getsignal(number) is receive:
            seconds, listener = GRACE_SECONDS, None
        elif (listener := _listener) is not None:
            seconds = listener.heard(number)
        else:
            continue
        if seconds is not None:
            timer = threading.Timer(seconds, _end_if_overdue, (number, listener))
            timer.daemon = True
            timer.start()


def _end_if_overdue(number: int, listener: Listener | None) -> None:
    if listener is None or listener.is_overdue():
        end(number)


def _release() -> None:
    """Gives a forked child its own signals back: it must not write into its parent's pipe."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is receive:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
