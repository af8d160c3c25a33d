"""Traces of some steps for XProf or Perfetto: those that the config names, or on demand."""

import contextlib
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import jax

REQUEST = "profile_now"  # of a workdir: each time it is touched, all processes trace
LOOK_EVERY = 10.0  # seconds
_STEPS = 3  # of a trace on demand, unless the config says how many


class StepTrace:
    """Records jax.profiler traces of some steps, each into a folder of its own below `folder`.

    On demand: SIGUSR1 traces the next steps of the process that gets it; touching the file
    `request` those of every process that sees it, within ten seconds.

    Args:
      folder: where traces are written.
      first: first step of the trace that the config asks for.
      steps: number of steps; 0 for no trace by the config.
      request: the file to look for; None for none.
      clock: seconds, for tests.
      writing: what is around a trace's end, which takes a while.
    """

    def __init__(
        self,
        folder: Path,
        first: int,
        steps: int,
        *,
        request: Path | None = None,
        clock: Callable[[], float],
        writing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        self._folder, self._first, self._steps = folder, first, steps
        self._request, self._clock, self._writing = request, clock, writing
        self._last = -1  # step of the running trace; -1 if none runs
        self._signalled = False
        self._touched, self._looked = self._time_of_request(), clock()
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGUSR1, self._receive)

    def before(self, step: int) -> None:
        """Starts a trace at its first step."""
        by_config = self._steps and step == self._first
        if self._last < 0 and (by_config or self._asked()):
            self._signalled = False
            jax.profiler.start_trace(str(self._folder))
            self._last = step + (self._steps or _STEPS) - 1

    def after(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Ends the trace once the devices have finished its last step."""
        if step == self._last:
            jax.block_until_ready(metrics)
            self._stop()

    def close(self) -> None:
        """Ends a trace that is still running, and gives the signal back."""
        self._stop()
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)
            self._previous = None

    def _stop(self) -> None:
        if self._last >= 0:
            with self._writing():
                jax.profiler.stop_trace()
            self._last = -1

    def _asked(self) -> bool:
        now = self._clock()
        if self._request is not None and now - self._looked >= LOOK_EVERY:
            self._looked, touched = now, self._time_of_request()
            if touched != self._touched:
                self._touched = touched
                if touched:  # not where it was removed
                    return True
        return self._signalled

    def _time_of_request(self) -> float:
        with contextlib.suppress(OSError):
            return self._request.stat().st_mtime if self._request is not None else 0.0
        return 0.0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
