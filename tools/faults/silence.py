"""Rows of hosts that are gone, cut off or stopped, and of signals."""

import functools
import signal
import time
from collections.abc import Callable

from tools.faults.hosts import SPACES, Job, run
from tools.faults.rows import goes_on, row


def kill(job: Job, number: int) -> str:
    job.begin(30)
    job.fault(number, kind=signal.SIGKILL)
    job.finish()
    return ""


def link_down(job: Job, seconds: float) -> str:
    job.begin(30)
    run("ip", "-n", SPACES[1], "link", "set", "veth_b", "down")
    job.fault()
    job.look(seconds)
    run("ip", "-n", SPACES[1], "link", "set", "veth_b", "up")
    return goes_on(job)


def stop(job: Job, number: int, seconds: float) -> str:
    job.begin(30)
    job.fault(number, kind=signal.SIGSTOP)
    time.sleep(min(seconds, 1.0))
    job.look(seconds - 1.0)
    job.processes[number].send_signal(signal.SIGCONT)
    return goes_on(job)


for _name, _number in (("a", 0), ("b", 1)):
    row(f"kill -9 of host {_name}")(functools.partial(kill, number=_number))
for _seconds in (5, 30, 200):
    row(f"link down for {_seconds} s")(functools.partial(link_down, seconds=_seconds))
for _seconds in (20, 60, 150):
    for _name, _number in (("a", 0), ("b", 1)):
        row(f"host {_name} stopped for {_seconds} s")(
            functools.partial(stop, number=_number, seconds=_seconds)
        )


# ------------------------------------------------------------------ SIGTERM
def terminate(job: Job, ready: Callable[[Job], None], times: int = 1) -> str:
    job.start_both()
    ready(job)
    for again in range(times):
        if again:
            time.sleep(0.3)
            job.processes[1].send_signal(signal.SIGTERM)
        else:
            job.fault(1, kind=signal.SIGTERM)
    job.finish()
    return ""


def _evaluating(job: Job) -> None:
    job.wait_for_step(20)
    time.sleep(1.0)


MOMENTS: dict[str, tuple[Callable[[Job], None], dict]] = {
    "at the start": (lambda job: job.wait_for_join(), {}),
    "while compiling": (lambda job: job.wait_for_text(0, "step 0 of"), {"compiling": True}),
    "in a step": (lambda job: job.wait_for_step(30), {}),
    "in a save": (lambda job: job.wait_for_save(), {}),
    "in an evaluation": (
        _evaluating,
        {"flags": ["--config.train.eval_every=20", "--config.eval.draws=150"], "evaluating": True},
    ),
    "in the last step": (lambda job: job.wait_for_step(59), {"steps": 60}),
}
for _moment, (_ready, _settings) in MOMENTS.items():
    for _times, _word in ((1, ""), (2, ", twice")):
        row(f"SIGTERM on host b {_moment}{_word}", **_settings)(
            functools.partial(terminate, ready=_ready, times=_times)
        )
