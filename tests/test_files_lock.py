import os
import threading
import time

from microdit_jax.files import lock
from microdit_jax.files.lock import NAME, DiskLock


def test_a_lock_is_made_once_and_tells_its_age(tmp_path):
    first, second = DiskLock(tmp_path / "run"), DiskLock(tmp_path / "run")
    assert first.read() is None
    assert first.create("one") and not second.create("two")
    held = second.read()
    assert held is not None and held.text == "one" and held.age < 60
    os.utime(tmp_path / "run" / NAME, (time.time() - 100, time.time() - 100))
    assert 99 < second.read().age < 160
    first.renew(second.read())
    assert second.read().age < 60
    second.remove(held)  # not of this version any more
    assert second.read() is not None
    first.remove(first.read())
    assert not (tmp_path / "run").exists()  # which the lock alone had made


def test_of_many_that_take_a_claim_over_one_does(tmp_path):
    """Also those that have read the old claim before another one took it over."""
    locks = [DiskLock(tmp_path) for _ in range(12)]
    locks[0].create("old")
    for _ in range(10):
        held, found = locks[0].read(), {}
        start = threading.Barrier(len(locks))

        def take(number, held=held, found=found, start=start):
            start.wait()
            found[number] = locks[number].replace(held, f"{held.text}.{number}")

        threads = [threading.Thread(target=take, args=(n,)) for n in range(len(locks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [number for number, won in found.items() if won]
        assert locks[0].read().text == f"{held.text}.{winner}"
        assert not any(late.replace(held, "late") for late in locks)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_sign_of_life_saves_a_claim(tmp_path):
    mine, other = DiskLock(tmp_path), DiskLock(tmp_path)
    mine.create("mine")
    os.utime(tmp_path / NAME, (0, 0))
    held = other.read()
    mine.renew(held)
    assert not other.replace(held, "other") and mine.read().text == "mine"


def test_who_dies_while_taking_over_makes_room(tmp_path, monkeypatch):
    """Its turn's file is left, and removed when it is old."""

    def die(*paths):
        raise KeyboardInterrupt

    mine = DiskLock(tmp_path)
    mine.create("old")
    held = mine.read()
    with monkeypatch.context() as patched:
        patched.setattr(lock.Path, "unlink", lambda *args, **kw: None)
        patched.setattr(lock.os, "replace", die)
        try:
            mine.replace(held, "dead")
        except KeyboardInterrupt:
            pass
    (turn,) = tmp_path.glob(f"{NAME}.after.*")
    assert not mine.replace(held, "new") and turn.exists()
    os.utime(turn, (0, 0))
    assert not mine.replace(held, "new") and not turn.exists()
    assert mine.replace(held, "new") and mine.read().text == "new"
