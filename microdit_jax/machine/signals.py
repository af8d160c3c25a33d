"""SIGTERM and SIGINT (Ctrl-C) as a request to save and stop, agreed on by all processes."""

import itertools
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

# Not steps: the next stage's may begin at 0, and the one that was agreed on would never come.
_times_asked = itertools.count()


class StopRequest:
    """Within `with StopRequest() as stop:`, the first signal asks to stop, a second SIGINT kills.

    One process remembers the signal itself. With several, JAX's preemption service tells all of a
    SIGTERM that any of them got, and picks a time to ask that none has come to yet; a SIGINT
    becomes a SIGTERM. Asking costs microseconds; a collective each step would drain the device's
    queue.

    Signals reach the main thread of a program only: in any other this never asks to stop.
    """

    def __init__(self):
        self.received = False
        self._previous = {}

    def agreed(self) -> bool:
        """Whether all processes stop after this step; ask once a step, on all, in order."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(next(_times_asked))

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            # With several processes SIGTERM belongs to the preemption service since initialize().
            ours = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            self._previous = {number: signal.signal(number, self._receive) for number in ours}
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self.received = True
        name = signal.Signals(number).name
        print(f"{name}: saving and stopping; Ctrl-C again kills", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGINT and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
