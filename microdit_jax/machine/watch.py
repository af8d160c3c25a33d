"""Watches the processes of a job: what ends one ends all of them in seconds, with one line.

Every process tells that it lives, through the key-value store of the coordination service. Process
0 looks for one that has fallen silent. A *verdict* in the store ends all: who is gone, who failed
and why, or who was asked to stop. Each process has a thread that waits for it, whatever its main
thread does; a collective waits for ever for a process that is gone.

A process that itself stood still (suspended, or without a processor) judges nobody by the time that
it missed: slow is not dead.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from microdit_jax.errors import Late, UserError, visible
from microdit_jax.files import parse_json
from microdit_jax.machine import coordination, interrupts
from microdit_jax.machine.collective_errors import is_of_another
from microdit_jax.machine.coordination import Store, Unreachable
from microdit_jax.machine.silence import Silence, forgiven

BEAT_SECONDS, LOOK_SECONDS = 2.0, 1.0
GAP_SECONDS = 3 * BEAT_SECONDS  # between two looks of a thread: then this process stood still
SERVE_SECONDS = 1.0  # that process 0 goes on for others to read the verdict
_FAILED, _DEFECT = 2, 1  # exit statuses, as in commands.boundary
_BROKE = "ended with a defect ({}); see its log"

_current: "Watch | None" = None


class Watch:
    """The watch of this process over its job, from joining to the end.

    Attributes:
      library_log: the file that C++ libraries write to; named where the end may be theirs.
    """

    def __init__(self, store: Store, timeout_seconds: float):
        """
        Args:
          timeout_seconds: silence after which a process counts as gone.
        """
        self.store, self.library_log = store, ""
        self._number, self._timeout = store.process_id, timeout_seconds
        self._host = visible(socket.gethostname(), 64)
        self._step: int | None = None
        self._saved: int | None = None
        self._steps = False  # True once the job has said that it has steps
        self._first_host = "unknown"
        self._answered = time.monotonic()  # when process 0 took this process's last sign of life
        self._stood_still = 0.0
        self._ending, self._closed = threading.Lock(), threading.Event()
        self._stop: Callable[[], None] | None = None
        self._stop_set = threading.Event()
        self._threads = [
            threading.Thread(target=loop, name=f"watch {loop.__name__}", daemon=True)
            for loop in (self._beat, self._listen, self._look, self._hear_abort)
        ]

    def start(self) -> None:
        """Starts to watch."""
        global _current
        _current = self
        interrupts.tell_others(self.stopped_by)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the watch: this process's part is done, and its silence means nothing from now."""
        global _current
        _current = None
        interrupts.tell_others(None)
        self._closed.set()
        with contextlib.suppress(Unreachable):
            self.store.put(f"alive/{self._number}", json.dumps({"done": True}), replace=True)

    def join(self) -> None:
        """Waits for the threads, whose calls end with the connection; call after `close`."""
        for thread in self._threads:
            thread.join(5.0)

    def who(self) -> str:
        """Names this process, for messages."""
        return f"process {self._number} ({self._host})"

    # ---------------------------------------------------------------- what the run tells
    def at_step(self, step: int | None, *, saved: int | None = None) -> None:
        """Notes the step that a training run is at, and the newest step that is on disk."""
        self._steps = True
        self._step = self._step if step is None else step
        self._saved = self._saved if saved is None else saved

    def failed(self, message: str) -> None:
        """Ends the job by a fault of this process that a person can mend."""
        self._judge("failed", f"error: {self.who()}: {message}")

    def late(self, message: str) -> None:
        """Ends the job since a process was not there in time; the same command goes on."""
        self._judge("late", f"{self.who()}: {message}")

    def broken(self, reason: str) -> None:
        """Ends the job by a defect of this process."""
        self._judge("broken", f"{self.who()} {_BROKE.format(reason)}")

    def stopped_by(self, number: int) -> None:
        """Ends the job since a signal ended this process, within two seconds or not at all."""
        line = f"{self.who()} was stopped by {interrupts.name_of(number)}; {self.goes_on()}"
        teller = threading.Thread(target=self._judge, args=("stopped", line), daemon=True)
        teller.start()
        teller.join(2.0)

    def wait_for_verdict(self, seconds: float | None = None) -> None:
        """Waits in the main thread for the verdict, which ends this process; returns without one.

        Args:
          seconds: None waits as long as it takes to notice that a process is gone.
        """
        self._closed.wait(self._timeout + 2 * BEAT_SECONDS if seconds is None else seconds)

    # ---------------------------------------------------------------- an agreed stop
    def on_stop(self, call: Callable[[], None]) -> None:
        """Sets what a thread calls, once, when any process asks all of them to stop."""
        self._stop = call
        self._stop_set.set()

    def ask_to_stop(self) -> None:
        """Asks all processes to stop together."""
        with contextlib.suppress(Unreachable):
            self.store.put("stop", self.who())

    # ---------------------------------------------------------------- threads
    def _beat(self) -> None:
        """Tells every two seconds that this process lives; process 0 looks at all each second.

        Its call has no time-out where process 0 does not answer: `_look` sees that.
        """
        silence = Silence(self._timeout, GAP_SECONDS)
        count, last = 0, time.monotonic()
        while True:
            sign = {"count": count, "step": self._step, "host": self._host}
            with contextlib.suppress(Unreachable):  # _listen ends the process
                self.store.put(f"alive/{self._number}", json.dumps(sign), replace=True)
                self._answered = now = time.monotonic()
                if self._number == 0:
                    if now - last > GAP_SECONDS:
                        silence.stood_still(now - last, now)
                    last = now
                    self._find_silent(silence, now)
                else:
                    self._first_host = _host_of(self.store.wait("alive/0", BEAT_SECONDS))
            count += 1
            if self._closed.wait(BEAT_SECONDS if self._number else LOOK_SECONDS):
                return

    def _find_silent(self, silence: Silence, now: float) -> None:
        signs = self.store.folder("alive")
        for who in silence.hear(signs, now):
            sign = parse_json(signs[who])
            if "done" not in sign:
                at = "" if sign["step"] is None else f" since step {sign['step']}"
                name = f"process {who} ({sign['host']})"
                self._judge("gone", f"{name} is gone{at}; {self.goes_on()}")

    def _listen(self) -> None:
        """Ends this process by the verdict, or because process 0, which gives it, is gone."""
        while not self._closed.is_set():
            try:
                text = self.store.wait("verdict", 3600.0)
            except Unreachable:
                if not self._closed.is_set():
                    self._end_without_first("is gone")
                return
            if text is not None and not self._closed.is_set():
                self._end(parse_json(text))

    def _look(self) -> None:
        """Ends this process if process 0 stays silent; hears that another wants to stop."""
        last, asked = time.monotonic(), False
        while not self._closed.is_set():
            try:
                if asked:
                    self._closed.wait(LOOK_SECONDS)
                elif self.store.wait("stop", LOOK_SECONDS) is not None:
                    asked = True
                    threading.Thread(target=self._act_on_stop, daemon=True).start()
            except Unreachable:
                self._closed.wait(LOOK_SECONDS)  # _listen ends the process
            now = time.monotonic()
            if now - last > GAP_SECONDS:
                self._stood_still = now - last
                self._answered = forgiven(
                    self._answered, now - last, now, self._timeout, GAP_SECONDS
                )
            last = now
            silence = now - self._answered
            if self._closed.is_set() or silence < BEAT_SECONDS + LOOK_SECONDS / 2:
                continue
            # The library's threads may hang in its abort, so that no call of its client returns.
            if self._number and self.store.is_closed():
                self._end_without_first("is gone")
            if silence > self._timeout:
                self._end_without_first("is silent")

    def _hear_abort(self) -> None:
        """Ends this process with a line of its own where a C++ library has begun to abort it."""
        while not self._closed.wait(LOOK_SECONDS):
            if not coordination.is_aborting():
                continue
            time.sleep(LOOK_SECONDS)  # for a verdict, which knows the cause
            if self._stood_still > GAP_SECONDS:
                line = f"this process stood still for {self._stood_still:.0f} s, and a library"
                self._leave(
                    f"{line} gave up; {self.goes_on()}",
                    interrupts.STOPPED_EARLY,
                    libraries=True,
                )
            # In a thread: the client's calls may hang in the abort.
            said = "a library aborted it"
            threading.Thread(target=self.broken, args=(said,), daemon=True).start()
            time.sleep(2 * LOOK_SECONDS)
            self._leave(f"{self.who()} {_BROKE.format(said)}", _DEFECT, libraries=True)

    def _act_on_stop(self) -> None:
        self._stop_set.wait()
        if self._stop is not None:
            self._stop()

    # ---------------------------------------------------------------- the end
    def _judge(self, kind: str, line: str) -> None:
        """Posts a verdict, unless there is one: the first cause is the one that counts."""
        with contextlib.suppress(Unreachable):
            self.store.put("verdict", json.dumps({"kind": kind, "line": visible(line, 4000)}))

    def goes_on(self) -> str:
        """Says from where the same command goes on."""
        if not self._steps:
            return "the same command goes on"
        if self._saved is None:
            return "nothing was saved yet: the same command begins again"
        return f"the same command goes on from step {self._saved}"

    def _end(self, verdict: dict[str, Any]) -> NoReturn:
        status = {
            "failed": _FAILED,
            "broken": _DEFECT,
            "stopped": interrupts.status_if_stopped(interrupts.STOPPED_EARLY),
        }.get(verdict["kind"], interrupts.STOPPED_EARLY)
        if self._number == 0:
            time.sleep(SERVE_SECONDS)
        self._leave(verdict["line"], status, libraries=verdict["kind"] in ("gone", "broken"))

    def _end_without_first(self, how: str) -> NoReturn:
        at = "" if self._step is None else f" since step {self._step}"
        line = f"process 0 ({self._first_host}) {how}{at}; {self.goes_on()}"
        if self._stood_still > self._timeout:
            line = f"this process stood still for {self._stood_still:.0f} s, and {line}"
        self._leave(line, interrupts.STOPPED_EARLY, libraries=True)

    def _leave(self, line: str, status: int, *, libraries: bool) -> NoReturn:
        # As little as possible: where process 0 is gone JAX's own client aborts in a tenth of a
        # second, with pages of C++.
        with self._ending:
            if libraries and self.library_log:
                line += f"; what libraries said: {self.library_log}"
            interrupts.end_with(line, status)


def _host_of(sign: str | None) -> str:
    return "unknown" if sign is None else parse_json(sign).get("host", "unknown")


# ------------------------------------------------------------------ for all that may run in a job
def current() -> Watch | None:
    """Returns the watch of this process's job; None for a process alone."""
    return _current


def at_step(step: int | None, *, saved: int | None = None) -> None:
    """Notes where a training run is, as `Watch.at_step`; does nothing for a process alone."""
    if _current is not None:
        _current.at_step(step, saved=saved)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Tells the other processes of a failure at once, before any `with` block around it ends.

    What is no failure of this process itself, such as a connection that another one's end has cut,
    is left to the verdict.
    """
    try:
        yield
    except Exception as error:
        if _current is not None and not is_of_another(error):
            report(error)
        raise


def report(error: BaseException) -> None:
    """Tells the other processes what ended this one; does nothing for a process alone."""
    if _current is None:
        return
    if isinstance(error, Late):
        _current.late(str(error))
    elif isinstance(error, UserError):
        _current.failed(str(error))
    else:
        _current.broken(visible(f"{type(error).__name__}: {error}", 200))


def host_of(number: int) -> str:
    """Names a process of the job and its host, for messages."""
    if _current is None:
        return visible(socket.gethostname(), 64)
    with contextlib.suppress(Unreachable):
        sign = _current.store.folder("alive").get(str(number))
        return f"process {number} ({_host_of(sign)})"
    return f"process {number}"
