"""What ends one process of a job ends the others in seconds, by name: processes on loopback."""

import os
import re
import signal
import time

from support.processes import finish, free_port, start

from microdit_jax.commands import boundary
from microdit_jax.errors import Late
from microdit_jax.machine.collective_errors import is_of_another, named
from microdit_jax.machine.silence import Silence, forgiven

JOB = """
from microdit_jax.machine import watch

def main(arguments):
    number = int(arguments[1])
    with hosts.job(arguments[0], 2, number, timeout_seconds=60.0, heartbeat_seconds=8.0):
        watch.at_step(7, saved=5)
        hosts.barrier("begun")
        print("begun", flush=True)
        work(number, arguments)
    print("ended", flush=True)

if __name__ == "__main__":
    boundary.run_command("__main__")
"""
WAIT = """
def work(number, arguments):
    hosts.barrier(f"for ever {number}", timeout_seconds=300.0)
"""


def pair(work: str, *arguments, **environment) -> list:
    """Two processes of one job, once they have begun."""
    address = f"localhost:{free_port()}"
    processes = [
        start(work + JOB, address, number, *arguments, devices=1, **environment)
        for number in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "begun\n", finish(processes)
    return processes


def test_a_process_that_is_killed_is_named():
    for gone in range(2):
        processes = pair(WAIT)
        time.sleep(2.5)  # until the others know its step
        processes[gone].kill()
        began = time.monotonic()
        status, _, text = finish(processes, 60)[1 - gone]
        assert time.monotonic() - began < 40
        assert status == 75
        line = r" \(.+\) is gone since step 7; the same command goes on from step 5$"
        assert re.search(f"^process {gone}{line}", text, re.M), text


def test_slow_is_not_dead_and_silence_is():
    """A process that is stopped for less than the time-out goes on, whichever it is."""
    processes = pair(
        """
def work(number, arguments):
    time.sleep(1.0)
    hosts.barrier("stopped", timeout_seconds=300.0)
    print("again", flush=True)
    hosts.barrier(f"for ever {number}", timeout_seconds=300.0)
"""
    )
    for process in processes:
        process.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        process.send_signal(signal.SIGCONT)
    for process in processes:
        assert process.stdout.readline() == "again\n"
    processes[1].send_signal(signal.SIGSTOP)
    try:
        ((status, _, text),) = finish(processes[:1], 60)
    finally:
        processes[1].send_signal(signal.SIGCONT)
        ((late, _, told),) = finish(processes[1:], 60)
    assert (status, late) == (75, 75)
    assert re.search(r"^process 1 \(.+\) is gone since step 7; the same", text, re.M), text
    assert re.search(r"^(this process stood still for |process [01] \()", told, re.M), told


def test_a_failure_of_one_is_the_line_of_all():
    """Told at once, though the others wait in a collective; a thread's own failure too."""
    program = """
def work(number, arguments):
    if number == 1 and arguments[2] == "disk":
        raise UserError("could not write checkpoint 9: the disk is full")
    if number == 1 and arguments[2] == "defect":
        {}["nothing"]
    if number == 1 and arguments[2] == "thread":
        import threading
        fault = UserError("could not write checkpoint 9: the disk is full")
        threading.Thread(target=watch.report, args=(fault,)).start()
    if number == 1 and arguments[2] == "abort":
        import ctypes
        ctypes.CDLL(None).abort()
    hosts.barrier(f"for ever {number}", timeout_seconds=300.0)
"""
    for kind in ("disk", "thread", "defect", "abort"):
        began = time.monotonic()
        results = finish(pair(program, kind), 60)
        assert time.monotonic() - began < 50
        for status, _, text in results:
            if kind in ("defect", "abort"):
                assert status == 1 and "process 1 (" in text, results
                why = "KeyError: 'nothing'" if kind == "defect" else "a library aborted it"
                assert f"ended with a defect ({why}); see its log" in text
            else:
                assert status == 2, results
                assert re.fullmatch(
                    r"error: process 1 \(.+\): could not write checkpoint 9: the disk is full\n",
                    text,
                ), results


def test_a_signal_ends_all_at_once():
    """Whatever the main thread does, in C++ too; where a run may save it does, and then ends."""
    for number in (0, 1):
        processes = pair(WAIT)
        began = time.monotonic()
        processes[number].send_signal(signal.SIGTERM)
        results = finish(processes, 60)
        assert time.monotonic() - began < 15
        assert {status for status, _, _ in results} <= {75, 143}
        assert all("stopped" in text for _, _, text in results), results
        assert f"process {number} (" in results[1 - number][2]


def test_an_evaluation_is_left_together_and_a_stuck_one_ends():
    program = """
from microdit_jax.machine.signals import EvaluationStopped, Phase, StopRequest

def work(number, arguments):
    with StopRequest() as stop:
        stop.phase = Phase.EVALUATING
        try:
            for part in range(10_000):
                stop.check()
                hosts.barrier("part")
                time.sleep(0.01 + (part > 20 and arguments[2] == "stuck") * 300)
                if part == 20 and number == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
        except EvaluationStopped:
            stop.acted = True
            print("left", part, flush=True)
"""
    results = finish(pair(program, "soon"), 60)
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[0][1] == results[1][1] and "left" in results[0][1], results
    began = time.monotonic()
    results = finish(pair(program, "stuck"), 60)
    assert time.monotonic() - began < 40
    assert {status for status, _, _ in results} <= {75, 143}, results
    assert "process 1 (" in results[0][2] and "was stopped by SIGTERM" in results[0][2]


def test_one_that_stood_still_judges_nobody_by_the_time_it_missed():
    # Silent for 4 s, then 10 s were missed: it counts as silent for those 4 s.
    assert forgiven(86.0, 10.0, 100.0, 25.0, 6.0) == 96.0
    assert forgiven(99.0, 10.0, 100.0, 25.0, 6.0) == 100.0
    # Silent for nearly the time-out before: it has a moment to be heard.
    assert forgiven(66.0, 10.0, 100.0, 25.0, 6.0) == 81.0
    # Longer than the time-out: the others have ended by then, so that moment is enough.
    assert forgiven(39.0, 60.0, 100.0, 25.0, 6.0) == 81.0


def test_who_is_silent():
    silence = Silence(25.0, 6.0)
    assert silence.hear({"0": "1", "1": "1"}, 0.0) == []
    assert silence.hear({"0": "2", "1": "1"}, 25.0) == []
    assert silence.hear({"0": "3", "1": "1"}, 26.0) == ["1"]


def test_last_words_that_waited_are_no_sign_of_life():
    """After a minute of standing still: one sign may have lain in the socket, two may not."""
    for later, gone in ((["2"] * 8, ["1"]), (["2"] * 3 + ["3"] * 20, [])):
        silence = Silence(25.0, 6.0)
        silence.hear({"1": "1"}, 0.0)
        silence.stood_still(60.0, 60.0)
        found = [silence.hear({"1": sign}, 60.5 + after) for after, sign in enumerate(later)]
        assert found[-1] == gone and found[3] == []


def test_a_collective_that_broke_alone_is_late_and_a_defect_stays_one():
    error = RuntimeError("UNKNOWN: Gloo context initialization failed: timed out\nmore")
    told = named(error, "the same command goes on from step 5")
    assert isinstance(told, Late) and str(told).startswith("expected all processes in a collective")
    assert "initialization failed: timed out;" in str(told)
    assert str(told).endswith("the same command goes on from step 5")
    assert boundary.describe(told) == (75, str(told))
    defect = RuntimeError("INTERNAL: no such kernel")
    assert named(defect, "") is defect


def test_alone_there_is_no_watch():
    from microdit_jax.machine import watch

    assert watch.current() is None
    watch.at_step(1)
    watch.report(ValueError("nobody hears"))
    with watch.reported():
        assert os.getpid()


def test_an_array_that_a_broken_collective_was_to_give_is_of_another():
    broken = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    assert is_of_another(broken)
    error = ValueError("could not save")
    error.__cause__ = broken
    assert is_of_another(error)
    assert not is_of_another(ValueError("expected a file, found Gloo"))
