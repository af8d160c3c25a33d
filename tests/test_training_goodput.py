"""Every second of a stage counted once, by what it was spent on, over restarts."""

import json
import time

import pytest

from microdit_jax.errors import UserError
from microdit_jax.training import goodput
from microdit_jax.training.goodput import Goodput


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)
        monkeypatch.setattr(goodput.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(goodput, "_counted_until", None)
        monkeypatch.setattr(goodput, "_health_file", None)

    def spend(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def run(clock, workdir, steps, *, seconds=10.0):
    """A start of 5 s, a compilation of 20, steps of 1 s for data and the rest for themselves."""
    time = Goodput(workdir)
    clock.spend(5)
    time.begin(steps[0] - 1)
    with time.spent_on("compile"):
        clock.spend(20)
    for step in steps:
        with time.spent_on("data"):
            clock.spend(1)
        clock.spend(seconds - 1)
        time.step_done(step)
    return time


def spent(totals):
    return {kind: seconds for kind, seconds in totals.seconds.items() if seconds}


def test_all_time_is_counted_once(tmp_path, clock):
    time = run(clock, tmp_path, range(1, 4))
    with time.spent_on("evaluation"):
        clock.spend(7)
        with time.spent_on("save"):
            clock.spend(2)
        clock.spend(1)
    totals = time.totals()
    assert spent(totals) == {
        "start": 5, "compile": 20, "data": 3, "steps": 27, "evaluation": 8, "save": 2
    }  # fmt: skip
    assert sum(totals.seconds.values()) == clock.now - 1000
    figures = time.figures()
    assert figures["goodput"] == pytest.approx(27 / 65)
    assert figures["badput_compile"] == pytest.approx(20 / 65) and "badput_down" not in figures


def test_steps_after_a_kill_are_redone_and_the_pause_is_named(tmp_path, clock):
    """Killed at step 8, with a checkpoint of step 4: steps 5 to 8 bring nothing forward."""
    run(clock, tmp_path, range(1, 9))  # the last sums are those at step 8
    clock.spend(100)  # nothing runs
    time = run(clock, tmp_path, range(5, 11))
    assert (time.restarts, time.reached, time.redone) == (1, 8, 4)
    expected = {
        "start": 10, "compile": 40, "data": 14, "steps": 8 * 9 + 2 * 9, "redone": 4 * 9, "down": 100
    }  # fmt: skip
    assert spent(time.totals()) == expected
    time.close()
    assert goodput.read(tmp_path) == time.totals()
    assert goodput.read(tmp_path).reached == 10


def test_lines_tell_of_steps_after_the_last_sums(tmp_path, clock):
    run(clock, tmp_path, range(1, 3), seconds=1)  # too soon after the first for sums of its own
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 6}\n')
    assert goodput.read(tmp_path).reached == 1
    assert Goodput(tmp_path).reached == 6


def test_a_command_counts_from_its_start_and_later_stages_from_the_last(tmp_path, clock):
    goodput._counted_until = clock.now - 30
    first = run(clock, tmp_path, range(1, 2))
    first.close()
    assert first.totals().seconds["start"] == 35
    (tmp_path / "next").mkdir()
    clock.spend(3)
    assert run(clock, tmp_path / "next", range(1, 2)).totals().seconds["start"] == 8


def test_a_process_knows_its_age():
    began = time.time() - goodput._age()
    time.sleep(0.05)
    assert time.time() - goodput._age() == pytest.approx(began, abs=0.04)  # ticks of 0.01 s


def test_nothing_is_left_by_a_run_that_did_not_begin(tmp_path, clock):
    Goodput(tmp_path).close()
    assert not list(tmp_path.iterdir())
    gone = run(clock, tmp_path / "gone", range(1, 9))
    gone.close()
    assert not (tmp_path / "gone").exists()  # nor is a folder that was moved made anew
    time = run(clock, tmp_path, range(1, 3))
    (tmp_path / "goodput.json").unlink()  # as in the empty folder under a disk that was unmounted
    time.close()
    assert [path.name for path in tmp_path.iterdir()] == []


def test_the_health_file_is_written_while_the_main_thread_goes_on(tmp_path, clock, monkeypatch):
    file = tmp_path / "health"
    goodput.watch_this_process(str(file))
    assert json.loads(file.read_text())["doing"] == "start"
    time = run(clock, tmp_path, range(1, 4))
    found = json.loads(file.read_text())
    assert found == {"step": 3, "time": clock.now, "doing": "steps"}
    clock.spend(3)
    time.step_done(4)
    assert json.loads(file.read_text())["step"] == 3  # at most each ten seconds
    with time.spent_on("evaluation"):
        assert json.loads(file.read_text()) == {"step": 4, "time": clock.now, "doing": "evaluation"}
        clock.spend(20)
        time.beat()
        assert json.loads(file.read_text())["time"] == clock.now


@pytest.mark.parametrize(
    "found",
    [
        "[]",
        "{}",
        '{"reached": -1, "until": 0, "restarts": 0, "seconds": {}}',
        '{"reached": 1, "until": "x", "restarts": 0, "seconds": {}}',
        '{"reached": 1, "until": 1, "restarts": true, "seconds": {}}',
        '{"reached": 1, "until": 1, "restarts": 0, "seconds": []}',
        '{"reached": 1, "until": 1, "restarts": 0, "seconds": {"<b>": 1}}',
        '{"reached": 1, "until": 1, "restarts": 0, "seconds": {"steps": 1e99}}',
    ],
)
def test_damage_is_named(tmp_path, found):
    (tmp_path / "goodput.json").write_text(found)
    with pytest.raises(UserError, match="expected "):
        goodput.read(tmp_path)
