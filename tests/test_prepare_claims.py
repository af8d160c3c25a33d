"""Parts of a job claimed by several processes, some of which are lost or slow."""

import json
import os
import shutil
import threading

import pytest
from support.latent_datasets import contents
from test_prepare_job import Source, compute

from microdit_jax.files.lock import lock_of
from microdit_jax.prepare import claims, encoding
from microdit_jax.prepare.claims import Claims

NAMES = [f"{number:06}" for number in range(5)]
OTHER = json.dumps({"host": "elsewhere", "pid": 1, "token": "x"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    compute(folder)
    return folder


def claimed_by_another(output, number, age=0.0):
    folder = output / claims.FOLDER / NAMES[number]
    assert lock_of(folder).create(OTHER)
    changed = (folder / ".lock").stat().st_mtime - age
    os.utime(folder / ".lock", (changed, changed))


def no_wait():
    raise AssertionError("nobody else is at work")


def test_each_part_is_given_once_own_ones_first(tmp_path):
    (tmp_path / NAMES[3]).mkdir()
    with Claims(tmp_path, NAMES, process_index=1, process_count=3) as one:
        given = one.available()
        first = next(given)
        claimed_by_another(tmp_path, 2)
        (tmp_path / NAMES[0]).mkdir()  # done by another while this one was at work
        assert [first, *given] == [1, 4] and list(one.available()) == []
        assert one.left() == 3
        one.release(4)  # not done: it is there for all again
        assert list(one.available()) == [4]
    left = {path.parent.name for path in tmp_path.glob(".claims/*/.lock")}
    assert left == {NAMES[2]} and claims.others_at_work(tmp_path)


def test_a_lost_hosts_part_is_taken_over(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(claims, "wait_a_moment", no_wait)
    claimed_by_another(tmp_path, 1, age=claims.STALE_SECONDS + 5)
    source = Source()
    compute(tmp_path, source)
    assert source.reads == [0, 1, 2] and contents(tmp_path) == contents(whole)
    assert not (tmp_path / ".claims").exists()


def test_parts_of_hosts_that_are_at_work_are_waited_for(tmp_path, whole, monkeypatch):
    claimed_by_another(tmp_path, 1)
    waits = []

    def wait():
        waits.append(sorted(path.name for path in tmp_path.glob("0*")))
        if len(waits) == 2:
            shutil.copytree(whole / NAMES[1], tmp_path / NAMES[1])

    monkeypatch.setattr(claims, "wait_a_moment", wait)
    source = Source()
    compute(tmp_path, source)
    assert waits == [[NAMES[0], NAMES[2]]] * 2 and source.reads == [0, 2]
    assert contents(tmp_path) == contents(whole)


def test_a_host_that_was_only_slow_does_no_harm(tmp_path, whole, monkeypatch):
    """It comes back in the middle of a part, and all is done by another by then."""
    encode, slept = encoding._encode_batch, []

    def slow(*arguments):
        if not slept:
            slept.append(1)
            compute(tmp_path)  # which takes the claims of this process over
        return encode(*arguments)

    monkeypatch.setattr(encoding, "_encode_batch", slow)
    compute(tmp_path)
    assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.glob(".*"))


def test_processes_at_once_share_the_parts(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(claims, "is_gone", lambda owner: False)  # as on two hosts
    monkeypatch.setattr(claims, "wait_a_moment", lambda: threading.Event().wait(0.01))
    sources = Source(), Source()
    threads = [
        threading.Thread(
            target=compute, args=(tmp_path, source),
            kwargs={"process_index": index, "process_count": 2},
        )
        for index, source in enumerate(sources)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sources[0].reads + sources[1].reads) == [0, 1, 2]
    assert contents(tmp_path) == contents(whole)


def test_claims_give_signs_of_life_but_not_for_others(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    with Claims(tmp_path, NAMES) as one:
        assert [number for number, _ in zip(one.available(), range(2), strict=False)] == [0, 1]
        locks = [tmp_path / ".claims" / NAMES[number] / ".lock" for number in (0, 1)]
        locks[1].write_text(OTHER)  # taken over
        for lock in locks:
            os.utime(lock, (1000, 1000))
        while locks[0].stat().st_mtime == 1000:
            threading.Event().wait(0.01)
        threading.Event().wait(0.1)
        assert locks[1].stat().st_mtime == 1000
    assert not locks[0].exists() and locks[1].read_text() == OTHER
