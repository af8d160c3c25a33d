"""Traces of the steps that were asked for: by the config, by a signal, by a file."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import pytest

from microdit_jax.training.profiling import LOOK_EVERY, StepTrace


class Steps:
    """Steps of 1 s, and what the profiler was told between them."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.calls, self.now = folder, [], 0.0
        monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: self.calls.append("start"))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self.calls.append("stop"))

    def trace(self, first, steps, **more):
        return StepTrace(self.folder, first, steps, clock=lambda: self.now, **more)

    def run(self, trace, steps):
        self.calls.clear()
        for step in steps:
            self.now += 1
            trace.before(step)
            self.calls.append(step)
            trace.after(step, {"loss": jnp.float32(1)})
        return self.calls


@pytest.fixture
def steps(tmp_path, monkeypatch):
    return Steps(tmp_path, monkeypatch)


def test_a_trace_covers_its_steps(steps):
    for first, count, expected in (
        (3, 2, [1, 2, "start", 3, 4, "stop", 5]),
        (2, 0, [1, 2, 3, 4, 5]),
    ):
        trace = steps.trace(first, count)
        assert steps.run(trace, range(1, 6)) == expected
        trace.close()
    trace = steps.trace(1, 5)
    steps.run(trace, [1])
    trace.close()  # a run that ends early
    assert steps.calls == ["start", 1, "stop"]


def test_a_signal_traces_the_next_steps(steps):
    before = signal.getsignal(signal.SIGUSR1)
    trace = steps.trace(1, 0)
    assert steps.run(trace, [1]) == [1]
    os.kill(os.getpid(), signal.SIGUSR1)
    assert steps.run(trace, range(2, 7)) == ["start", 2, 3, 4, "stop", 5, 6]
    trace.close()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_file_that_is_touched_traces_the_next_steps(steps, tmp_path):
    request = tmp_path / "profile_now"
    request.touch()  # of an earlier start
    trace = steps.trace(1, 0, request=request)
    assert "start" not in steps.run(trace, range(1, 15))
    os.utime(request, (1, 1))
    found = steps.run(trace, range(15, 15 + int(LOOK_EVERY) + 6))
    assert found.count("start") == found.count("stop") == 1
    assert found.index("stop") - found.index("start") == 4  # three steps
    request.unlink()
    assert "start" not in steps.run(trace, range(50, 70))
    request.touch()
    assert "start" in steps.run(trace, range(70, 90))
    trace.close()


def test_in_a_thread_there_are_no_signals(steps):
    made = []
    thread = threading.Thread(target=lambda: made.append(steps.trace(1, 1)))
    before = signal.getsignal(signal.SIGUSR1)
    thread.start()
    thread.join()
    assert steps.run(made[0], [1]) == ["start", 1, "stop"]
    made[0].close()
    assert signal.getsignal(signal.SIGUSR1) is before
