"""Ctrl-C, SIGTERM and SIGHUP as a request to save and stop, agreed on by all processes.

Everywhere else in a command these signals end it (machine.interrupts).
"""

import enum
import signal
import sys
import threading
from types import FrameType

from microdit_jax.machine import interrupts, watch

EVALUATION_SECONDS = 3.0  # to leave an evaluation; then the process ends without saving


class Phase(enum.Enum):
    """Parts of a run's work, which decide how it answers to a signal."""

    STARTING = "ends at once: there is nothing to save"
    EVALUATING = "leaves the evaluation, saves and stops; or ends, if that takes too long"
    TRAINING = "saves after this step and stops"


class StopRequest:
    """A signal received within `with StopRequest() as stop:`, for the loop in it to act on.

    With several processes the one that was signalled asks all others through the job's store. Each
    answers how often its loop has asked, and all stop at the next number that none has reached yet.
    Asking costs microseconds; a collective in each step would drain the device's queue.

    A second signal ends the process at once. Signals reach the main thread of a program only: in
    any other this never asks to stop. Signals that the process ignores (nohup ignores SIGHUP) stay
    ignored.

    Attributes:
      received: True if this process was signalled.
      acted: True once the loop has begun to stop; the loop sets it.
      phase: what the run does now; the loop sets it.
    """

    def __init__(self):
        self.received = self.acted = False
        self.phase = Phase.TRAINING
        self._previous = {}
        self._signals = 0
        self._lock, self._decided = threading.Lock(), threading.Event()
        self._times_asked, self._stop_at, self._wanted = 0, 0, False

    def agreed(self) -> bool:
        """Returns True if all processes stop here; ask in the same places on all of them.

        In the loop once a step, in an evaluation between its parts.
        """
        if watch.current() is None:
            return self.received
        with self._lock:
            self._times_asked += 1
            if not self._wanted:
                return False
        # Threads decide; until they have, no main thread goes past the number that it told.
        self._decided.wait()
        return self._times_asked >= self._stop_at

    def check(self) -> None:
        """Raises EvaluationStopped if all processes leave the evaluation here."""
        if self.agreed():
            raise EvaluationStopped

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            ours = {n for n in interrupts.SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
            self._previous = {number: signal.signal(number, self._receive) for number in ours}
            interrupts.listen(self)
        if (job := watch.current()) is not None:
            job.on_stop(self._decide)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._previous:
            interrupts.listen(None)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    # ---------------------------------------------------------------- a signal
    def heard(self, number: int) -> float | None:
        """Answers to `interrupts`, in whose thread signals arrive first."""
        self._signals += 1
        if self._signals > 1:
            return 0.0
        if self.phase is Phase.STARTING:
            return interrupts.GRACE_SECONDS
        self._ask_all()
        return EVALUATION_SECONDS if self.phase is Phase.EVALUATING else None

    def is_overdue(self) -> bool:
        """Returns True after a second signal, or where the first one has led to nothing."""
        return self._signals > 1 or not (self.acted or self.phase is Phase.TRAINING)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.phase is Phase.STARTING:
            interrupts.receive(number, frame)
        if self.received:
            interrupts.end(number)
        self.received = True
        name = interrupts.name_of(number)
        print(f"{name}: saving and stopping; a second signal ends it", file=sys.stderr, flush=True)
        if not interrupts.installed():
            self._signals += 1
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where Python gets no turn
            self._ask_all()

    # ---------------------------------------------------------------- together
    def _ask_all(self) -> None:
        """Asks the other processes, in a thread: a handler must not wait for the network."""
        if (job := watch.current()) is not None:
            threading.Thread(target=job.ask_to_stop, daemon=True).start()

    def _decide(self) -> None:
        """Agrees on where to stop; the watch calls it in a thread, on every process."""
        job = watch.current()
        if job is None:
            return
        store = job.store
        with self._lock:
            self._wanted, told = True, self._times_asked
        store.put(f"stop at/{store.process_id}", str(told))
        counts = [int(store.wait_for(f"stop at/{i}")) for i in range(store.num_processes)]
        self._stop_at = max(counts) + 1
        self._decided.set()


class EvaluationStopped(Exception):
    """Raised in an evaluation on all processes, at the same place, to stop."""
