"""Attacks on the port where a job's processes meet: on loopback, few and short."""

import contextlib
import socket
import threading
import time

import pytest
from support.hostile import ROOT, assert_refused, run_hostile
from support.processes import free_port, preflights

from microdit_jax.machine import handshake, preflight
from microdit_jax.machine.cluster import Job
from microdit_jax.machine.handshake import Introduction, WrongToken

LINES = [
    b'{"process_id": [1], "num_processes": 3, "host": "h", "nonce": "00"}\n',
    b'{"process_id": "1", "num_processes": 3, "host": "h"}\n',
    b'{"process_id": true, "num_processes": 3, "host": "h"}\n',
    b'{"process_id": 1e0, "num_processes": 3, "host": "h"}\n',
    b'{"process_id": 1, "num_processes": 1e400}\n',
    b'{"host": "\\ud800"}\n',
    b"[" * 200_000 + b"\n",
    b'{"a": ' * 600 + b"1\n",
    b"\xff\xfe\x00\n",
    b"null\n\n\n",
    b"\n" * 5000,
    b"GET / HTTP/1.1\r\n\r\n",
]


def connect(port: int, stop: threading.Event) -> socket.socket:
    """Connects as soon as somebody listens; raises OSError once it is to stop."""
    while True:
        try:
            return socket.create_connection(("localhost", port), timeout=5)
        except OSError:
            if stop.wait(0.05):
                raise


def claim(connection: socket.socket, who: Introduction, token: str) -> None:
    nonce = handshake.parse_greeting(handshake.read_line(connection, time.monotonic() + 5))
    connection.sendall(handshake.introduce(who, nonce, token))


class Attack:
    """Everything at once, from one thread for each kind, until it is told to stop."""

    def __init__(self, port: int, *, token: str):
        self.stop, self.cut, self.port = threading.Event(), 0, port
        kinds = [self.lines, self.drip, self.flood, self.idle, lambda: self.claims(token)]
        self.threads = [threading.Thread(target=kind, daemon=True) for kind in kinds]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(10)

    def lines(self):
        for line in LINES:
            with contextlib.suppress(OSError), connect(self.port, self.stop) as connection:
                connection.sendall(line)

    def drip(self):
        with contextlib.suppress(OSError), connect(self.port, self.stop) as connection:
            for _ in range(100):
                connection.sendall(b"1")
                if self.stop.wait(0.2):
                    return

    def flood(self):
        with contextlib.suppress(OSError), connect(self.port, self.stop) as connection:
            for _ in range(200):  # 20 MB without a line end
                connection.sendall(b"1" * 100_000)
            return
        self.cut += 1

    def idle(self):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(connect(self.port, self.stop))
            self.stop.wait(10)

    def claims(self, token: str):
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as stack:
            for who in (1, 2, 1):
                connection = stack.enter_context(connect(self.port, self.stop))
                claim(connection, Introduction(who, 3, "evil", "0" * 32), token)
            other = stack.enter_context(connect(self.port, self.stop))
            claim(other, Introduction(1, 2, "evil", "0" * 32), token)
            self.stop.wait(10)


def test_a_job_meets_amid_attacks():
    address = f"localhost:{(port := free_port())}"
    jobs = [Job(address, 3, number, token="secret") for number in range(3)]
    errors: list[str] = []
    first = threading.Thread(target=lambda: errors.extend(preflights(jobs[0], seconds=20.0)))
    began = time.monotonic()
    with Attack(port, token="guess") as attack:
        first.start()
        time.sleep(1.5)  # the others come late
        errors += preflights(*jobs[1:], seconds=20.0)
        first.join()
    assert errors == [""] * 3 and time.monotonic() - began < 15
    assert attack.cut  # after a few kilobytes of its 20 MB
    assert preflights(*jobs, seconds=20.0) == [""] * 3  # the port is free again


def test_the_command_under_attack(tmp_path):
    """train_main.py ends at its time-out with one line, and little memory."""
    port = free_port()
    command = [
        str(ROOT / "train_main.py"), f"--config={ROOT}/tests/support/tiny_config.py:{tmp_path}",
        f"--workdir={tmp_path / 'run'}", f"--coordinator_address=localhost:{port}",
        "--num_processes=3", "--process_id=0", "--join_timeout=4", "--job_token=secret",
    ]  # fmt: skip
    with Attack(port, token=""):
        line = assert_refused(run_hostile(command, tmp_path), status=75, begin="expected ")
    assert "expected 3 processes within 4 s, found 0 (" in line and "; missing: 1, 2; " in line
    assert "calls with another --job_token" in line and not (tmp_path / "run").exists()


def test_the_token_is_the_same_or_nobody_is_counted():
    address = f"localhost:{free_port()}"
    errors = preflights(Job(address, 2, 0, token="a"), Job(address, 2, 1, token="b"))
    assert "calls with another --job_token; missing: 1;" in errors[0]
    assert "found nobody (it hung up, as it does on another --job_token); missing: 0" in errors[1]
    assert "secret" not in repr(Job(address, 2, 0, token="secret"))


ANSWERS = [
    b"[]\n",
    b'{"nonce": 3}\n',
    b"[" * 200_000 + b"\n",
    b"1" * 1_000_000,
    b'{"nonce": "' + b"0" * 32 + b'"}\n{"fault": "\\u001b[2J all is well", "proof": "00"}\n',
    b'{"nonce": "' + b"0" * 32 + b'"}\n{"fault": ["x"], "proof": []}\n',
    b'{"nonce": "' + b"0" * 32 + b'"}\n' + b"[" * 4000 + b"\n",
]


def test_a_false_process_0_is_not_believed():
    """Nor waited for past the time-out, whatever it answers."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        answers = iter(ANSWERS * 20)

        def serve():
            with contextlib.suppress(OSError):
                for answer in answers:
                    connection, _ = server.accept()
                    with contextlib.suppress(OSError), connection:
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        began = time.monotonic()
        (error,) = preflights(Job(f"localhost:{port}", 2, 1, token="secret"), seconds=2.0)
        assert time.monotonic() - began < 8
    assert "expected process 0 at localhost" in error and error.isprintable()


def test_an_answer_that_never_ends(monkeypatch):
    """One byte at a time keeps nobody for longer than a connection may take."""
    monkeypatch.setattr(preflight, "CALL_SECONDS", 1.0)
    with socket.create_server(("localhost", 0)) as server:

        def drip():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with contextlib.suppress(OSError), connection:
                        for _ in range(100):
                            connection.sendall(b"1")
                            time.sleep(0.1)

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        job = Job(f"localhost:{server.getsockname()[1]}", 2, 1)
        (error,) = preflights(job, seconds=1.5)
        assert "found nobody" in error and time.monotonic() - began < 6


def test_proofs():
    who = Introduction(1, 3, "host-1", "ab" * 16)
    line = handshake.introduce(who, "0" * 32, "secret").strip()
    assert handshake.parse_introduction(line, "0" * 32, "secret") == who and b"secret" not in line
    for nonce, token in (("1" * 32, "secret"), ("0" * 32, "")):
        with pytest.raises(WrongToken):
            handshake.parse_introduction(line, nonce, token)
    with pytest.raises(WrongToken):  # changed on its way
        handshake.parse_introduction(line.replace(b"host-1", b"host-2"), "0" * 32, "secret")
    answer = handshake.answer("", who.nonce, "secret").strip()
    assert handshake.parse_answer(answer, who.nonce, "secret") == ("", False)
    assert handshake.parse_answer(
        handshake.answer("who?", who.nonce, "secret", late=True).strip(), who.nonce, "secret"
    ) == ("who?", True)
    with pytest.raises(WrongToken):
        handshake.parse_answer(answer, "1" * 32, "secret")


def test_many_processes_fit_into_an_answer():
    counter = preflight._Counter(Job("localhost:1", 100_000, 0), 0.0)
    for number in range(1, 50_000):
        who = Introduction(number, 100_000, "h" * 64, "0" * 32)
        counter._calls[number] = preflight._Call(who, socket.socket.__new__(socket.socket))
    fault = counter._missing()
    assert "and 49984 more" in fault and "; missing: 50000, " in fault
    assert len(handshake.answer(fault, "0" * 32, "x")) < handshake.LINE_BYTES
