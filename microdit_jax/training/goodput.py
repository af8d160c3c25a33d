"""Goodput: the share of a stage's wall time in steps that bring it forward, over all restarts.

The rest has names (`KINDS`). Every moment from the first start to now is counted once: the main
thread says what it does, and the time between two processes is "down". Process 0 keeps the sums in
WORKDIR/goodput.json, and each process may keep a file for a probe of its health.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from microdit_jax.errors import UserError, visible
from microdit_jax.files import read_json, write_json
from microdit_jax.training.metric_writer import METRICS_FILE, read_metrics

FILE = "goodput.json"
BEAT_SECONDS = 10.0  # at least, between two writes
KINDS = {
    "steps": "steps that bring the run forward",
    "start": "starting: imports, joining the job, opening data, weights from scratch",
    "restore": "reading the state to start from",
    "compile": "compiling the step",
    "data": "waiting for a batch",
    "evaluation": "evaluations and samples",
    "save": "checkpoints",
    "profile": "writing profiles",
    "redone": "steps run again after a restart from an older checkpoint",
    "down": "no process at all, between two starts",
}

_health_file: Path | None = None
_counted_until: float | None = None  # time.time() up to which this process is accounted for


def watch_this_process(health_file: str | None = None) -> None:
    """Counts this process from its start, not from the call of `train`; for commands.

    Args:
      health_file: written every few seconds while the main thread goes on.
    """
    global _health_file, _counted_until
    _health_file = Path(health_file) if health_file else None
    _counted_until = time.time() - _age()
    if _health_file is not None:
        _sign(_health_file, 0, "start")


def _age() -> float:
    """Returns the seconds since this process began; 0 where the system does not say."""
    try:
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): 22
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - int(ticks) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0


class Totals(NamedTuple):
    """Sums of a stage, as goodput.json holds them.

    Attributes:
      reached: the last step that any process has done.
      until: seconds since 1970 up to which time is counted.
      restarts: how often it began again.
      seconds: by kind.
    """

    reached: int
    until: float
    restarts: int
    seconds: dict[str, float]

    @property
    def goodput(self) -> float:
        """Share of all time that was spent in steps; 0 without any time."""
        return self.seconds["steps"] / (sum(self.seconds.values()) or 1.0)

    def badput(self) -> dict[str, float]:
        """Shares of all time by what else it was spent on, without those of no time."""
        whole = sum(self.seconds.values()) or 1.0
        shares = {kind: seconds / whole for kind, seconds in self.seconds.items()}
        return {kind: share for kind, share in shares.items() if share and kind != "steps"}


def read(workdir: str | os.PathLike) -> Totals | None:
    """Reads the sums of a stage; None if it has none.

    Raises:
      UserError: the file is damaged.
    """
    path = Path(workdir) / FILE
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        totals = Totals(
            _count(found["reached"]),
            _number(found["until"]),
            _count(found["restarts"]),
            {kind: _number(found["seconds"].get(kind, 0.0)) for kind in KINDS},
        )
        if not isinstance(found["seconds"], Mapping) or found["seconds"].keys() - KINDS:
            raise ValueError("kinds of time that there are not")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"expected the sums of a stage's time in {visible(path)}, found damage; remove it, and "
            "they begin anew"
        ) from error
    return totals


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ValueError("no such time")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("no such count")
    return value


class Goodput:
    """Adds up what this process's main thread does, on top of what the ones before it did.

    Args:
      workdir: of the stage.
      writes: True on the process that keeps the sums.

    Attributes:
      reached: the last step that was done before this start, by processes that are gone.
      redone: steps of this process that were done before.
    """

    def __init__(self, workdir: Path, *, writes: bool = True):
        self._workdir, self._writes, self._health = workdir, writes, _health_file
        self._kept = workdir  # what must be there for the sums to be written: later their own file
        found = read(workdir) if writes else None
        self._seconds = dict.fromkeys(KINDS, 0.0) if found is None else dict(found.seconds)
        self.restarts = 0 if found is None else found.restarts + 1
        self.reached = 0 if found is None else max(found.reached, _last_line(workdir))
        self.redone, self._step, self._begun = 0, 0, False
        self._doing = ["start"]
        now = time.time()
        since = now if _counted_until is None else min(now, _counted_until)
        if found is not None:
            self._seconds["down"] += max(0.0, since - found.until)
        self._clock = time.perf_counter() - (now - since)
        self._beaten = -BEAT_SECONDS
        self.beat()

    # ---------------------------------------------------------------- what the main thread does
    def begin(self, step: int) -> None:
        """Begins the loop after this step; from now on the sums are kept."""
        self._step, self._begun = step, True
        self._change(["steps" if step >= self.reached else "redone"])
        self._beat()

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """Counts the time of a `with` block as one of `KINDS`; blocks within it count alone."""
        outer = self._doing
        self._change([*outer, kind])
        if kind != "data":  # which comes with every step
            self._beat()
        try:
            yield
        finally:
            self._change(outer)

    def step_done(self, step: int) -> None:
        """Notes that the devices have finished a step."""
        self._step = step
        self.redone += step <= self.reached
        self._change(["steps" if step >= self.reached else "redone", *self._doing[1:]])
        self.beat()

    def end(self) -> None:
        """Counts from here to the process's end as saving: the last checkpoint is waited for."""
        self._change(["save"])

    def beat(self) -> None:
        """Shows that the main thread goes on; writes at most every ten seconds."""
        if time.perf_counter() - self._beaten >= BEAT_SECONDS:
            self._beat()

    # ---------------------------------------------------------------- results
    def totals(self) -> Totals:
        """Returns the sums up to now."""
        self._change(self._doing)
        reached = max(self.reached, self._step)
        return Totals(reached, time.time(), self.restarts, dict(self._seconds))

    def figures(self) -> dict[str, float]:
        """Returns what a line of metrics.jsonl says: shares of wall time, and steps done again."""
        totals = self.totals()
        rest = {f"badput_{kind}": share for kind, share in totals.badput().items()}
        return {"goodput": totals.goodput, **rest, "redone_steps": self.redone}

    def close(self) -> None:
        """Writes the sums at the end; raises nothing."""
        global _counted_until
        with contextlib.suppress(UserError, OSError):
            self._beat()
        _counted_until = time.time()

    def _change(self, doing: list[str]) -> None:
        now = time.perf_counter()
        self._seconds[self._doing[-1]] += now - self._clock
        self._clock, self._doing = now, doing

    def _beat(self) -> None:
        self._beaten = time.perf_counter()
        if self._health is not None:
            _sign(self._health, self._step, self._doing[-1])
        # A workdir that is moved away or unmounted is not made anew: the claim on it says so.
        if self._writes and self._begun and self._kept.exists():
            totals = self.totals()
            self._kept = self._workdir / FILE
            write_json(self._kept, {"step": self._step} | totals._asdict())


def _sign(path: Path, step: int, doing: str) -> None:
    write_json(path, {"step": step, "time": time.time(), "doing": doing})


def _last_line(workdir: Path) -> int:
    """Returns the last step in metrics.jsonl, which may be later than the last beat."""
    if not (workdir / METRICS_FILE).is_file():
        return 0
    return max((line["step"] for line in read_metrics(workdir)), default=0)
