"""Runs one target on inputs, and checks after each what no file may have changed."""

import faulthandler
import math
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fuzz.mutate import mutated
from fuzz.scratch import Scratch
from fuzz.targets import target
from fuzz.watch import Escape, Watch
from microdit_jax.errors import UserError, visible

CORPORA = Path(__file__).parent / "corpora"
HANG_SECONDS = 10
GROWTH_BYTES = 2 << 30


class Runner:
    """A target with its folder and its watch; the corpus is read once at the start.

    Args:
      watch_limits: end the process, with a traceback, where an input takes too long, and fail one
        that takes too much memory; libFuzzer does so by itself.

    Attributes:
      executions: how many inputs were read.
    """

    def __init__(self, name: str, *, watch_limits: bool = True):
        self._watch_limits, self._armed = watch_limits, -math.inf
        self.name, self.target, self.scratch = name, target(name), Scratch()
        self._read = self.target.open(self.scratch)
        self._watch = Watch(self.scratch.folder)
        self.executions = 0
        # Twice: the first time readers import modules, which is no file's doing.
        for file in self.corpus():
            self._try(file.read_bytes())
        self._largest = _peak_bytes()
        for file in self.corpus():
            self.execute(file.read_bytes())

    def corpus(self) -> list[Path]:
        """Returns the committed inputs."""
        return sorted((CORPORA / self.name).iterdir())

    def mutated(self, chance: random.Random, inputs: Sequence[bytes]) -> bytes:
        """Returns a mutation of one of these inputs."""
        target = self.target
        return mutated(chance, inputs, target.words, target.max_bytes, target.grammar)

    def execute(self, data: bytes) -> None:
        """Reads one input.

        Raises:
          Escape: the input did what no file may do.
          BaseException: whatever the reader raised that it does not document.
        """
        self.executions += 1
        with self._watch.reading():
            self._try(data)
        if self._watch_limits and _peak_bytes() - self._largest > GROWTH_BYTES:
            raise Escape(f"took more than {GROWTH_BYTES:,} bytes of memory")

    def _try(self, data: bytes) -> None:
        # Once a second, as arming takes longer than most inputs do.
        if self._watch_limits and time.monotonic() > self._armed + 1:
            self._armed = time.monotonic()
            faulthandler.dump_traceback_later(HANG_SECONDS + 1, exit=True)
        try:
            self._read(data)
        except self.target.refusals as error:
            if isinstance(error, UserError) and str(error) != visible(error, most=sys.maxsize):
                raise Escape(f"an error that a terminal would act upon: {error!a}") from error

    def close(self) -> None:
        """Removes the target's folder."""
        faulthandler.cancel_dump_traceback_later()
        self.scratch.remove()


def _peak_bytes() -> int:
    # Not getrusage's, which begins at that of the process that started this one.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0
