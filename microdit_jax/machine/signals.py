"""Ctrl-C, SIGTERM and SIGHUP as a request to save and stop, agreed on by all processes.

Everywhere else in a command these signals end it (machine.interrupts).
"""

import itertools
import os
import signal
import sys
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from microdit_jax.machine import interrupts

# Counts questions, not steps: the next stage's steps may begin at 0 again, and the step that the
# processes had agreed on would never come.
_times_asked = itertools.count()


class StopRequest:
    """A signal received within `with StopRequest() as stop:`, for the loop in it to act on.

    One process remembers the signal itself. With several, JAX's preemption service tells all of
    them about a SIGTERM that any of them received, and picks a step that none has reached yet;
    other signals become a SIGTERM. Asking costs microseconds; a collective in each step would
    drain the device's queue. After the first signal, Ctrl-C kills.

    Signals reach the main thread of a program only: in any other this never asks to stop. Signals
    that the process ignores (nohup ignores SIGHUP) stay ignored.
    """

    def __init__(self):
        self.received = False
        self._previous = {}

    def agreed(self) -> bool:
        """Returns True if all processes stop after this step; ask once a step, on all of them."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(next(_times_asked))

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            ours = {n for n in interrupts.SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
            if jax.process_count() > 1:  # SIGTERM belongs to the preemption service
                ours.discard(signal.SIGTERM)
            self._previous = {number: signal.signal(number, self._receive) for number in ours}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        name = signal.Signals(number).name
        print(f"{name}: saving and stopping; Ctrl-C again kills", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
