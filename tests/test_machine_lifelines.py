import socket
import threading
import time

from support.processes import finish, free_port, start

from microdit_jax.machine import handshake
from microdit_jax.machine.lifelines import JOINED, Lifelines, Peer


class Side:
    """One end's lifelines, and the line that would have ended its process."""

    def __init__(self, peers: dict, first: bool, seconds: float = 60.0):
        self.line, self.told = "", threading.Event()
        self.lines = Lifelines(peers, first=first, seconds=seconds, end=self._end)

    def _end(self, line: str) -> None:
        self.line = line
        self.told.set()


def connected(others: int, **how) -> tuple[Side, list[Side], list[socket.socket]]:
    """Process 0 and the others, each with its connection."""
    pairs = [socket.socketpair() for _ in range(others)]
    first = Side({n: Peer(f"h{n}", pair[0]) for n, pair in enumerate(pairs, 1)}, True, **how)
    return first, [Side({0: Peer("h0", pair[1])}, False) for pair in pairs], [p[1] for p in pairs]


def test_all_join():
    """In any order: who has joined hangs up, and is not missed."""
    first, others, _ = connected(3)
    sides = [*others[:2], first, *others[2:]]
    for side in sides:
        side.lines.__enter__()
    for side in sides:
        side.lines.__exit__(None, None, None)
        assert not any(side.told.wait(0.3) for side in sides), [side.line for side in sides]


def test_joined_right_behind_the_answer():
    """Process 0 may be through before another one has read its answer: both lines lie there."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b"the answer\n" + JOINED)
    theirs.close()
    with ours:
        assert handshake.read_line(ours, time.monotonic() + 5) == b"the answer"
        side = Side({0: Peer("h0", ours)}, False)
        with side.lines:
            assert not side.told.wait(0.5), side.line


def test_who_hangs_up_is_named_by_all():
    first, others, connections = connected(3)
    for side in (first, *others):
        side.lines.__enter__()
    connections[1].shutdown(socket.SHUT_RDWR)
    line = "process 2 (h2) is gone before all had joined; the same command goes on"
    for side in (first, others[0], others[2]):
        assert side.told.wait(10) and side.line == line
    for side in (first, *others):
        side.lines.__exit__(None, None, None)


def test_process_0_is_named_by_the_others():
    first, others, _ = connected(2)
    for side in (first, *others):
        side.lines.__enter__()
    first.lines.__exit__(KeyboardInterrupt, None, None)
    for side in others:
        assert side.told.wait(10) and side.line.startswith("process 0 (h0) is gone before all")
        side.lines.__exit__(None, None, None)


def test_one_that_stands_still_ends_all_at_the_time_out():
    """It hangs up nothing, and JAX's own time-out would abort."""
    first, others, connections = connected(2, seconds=0.5)
    with connections[1]:  # which does nothing
        for side in (first, others[0]):
            side.lines.__enter__()
        for side in (first, others[0]):
            assert side.told.wait(10) and "found one that stands still" in side.line
            side.lines.__exit__(TimeoutError, None, None)


def test_a_crash_between_the_preflight_and_the_join():
    """JAX waits, on the same port; the line is ours."""
    program = """
if sys.argv[2] == "1":
    jax.distributed.initialize = lambda *args, **more: os._exit(9)
hosts.initialize(sys.argv[1], 3, int(sys.argv[2]), timeout_seconds=120.0)
print("joined")
"""
    address = f"localhost:{free_port()}"
    results = finish([start(program, address, number, devices=1) for number in range(3)])
    assert [status for status, _, _ in results] == [75, 9, 75], results
    for _, out, text in (results[0], results[2]):
        assert not out and "process 1 (" in text, results
        assert text.endswith(") is gone before all had joined; the same command goes on\n")
