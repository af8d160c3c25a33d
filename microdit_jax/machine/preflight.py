"""Counts the processes of a job on the coordinator's port, before JAX waits for them.

Whoever reaches the port may call: lines are short, every connection and the whole have a deadline,
connections are served side by side, and what is not a call of this job is dropped.
"""

import contextlib
import dataclasses
import selectors
import socket
import time
from typing import NamedTuple

from microdit_jax.errors import Late, UserError, visible
from microdit_jax.machine import handshake
from microdit_jax.machine.cluster import Job
from microdit_jax.machine.handshake import LINE_BYTES, Introduction, WrongToken
from microdit_jax.machine.lifelines import Lifelines, Peer, probe

CALL_SECONDS = 5.0  # for a connection to say who it is
HANG_UP_SECONDS = 5.0  # for all to hang up, having been answered
MAX_PENDING = 256  # connections that have not said who they are; the oldest makes room
SHOWN = 16  # processes in an error


def preflight(job: Job, timeout_seconds: float) -> Lifelines:
    """Waits until every process of the job has called; process 0 counts, on the coordinator's port.

    jax.distributed.initialize would wait as long, but could not say for whom.

    Returns:
      The connections, to be held in a `with` block around that call.
    Raises:
      Late: on every process that is there, naming the numbers of those that are not.
      UserError: two processes with one number, other numbers of processes, a port that is taken.
    """
    deadline = time.monotonic() + timeout_seconds
    part = _Counter(job, deadline) if job.process_id == 0 else _Caller(job, deadline)
    if fault := part.run():
        raise (Late if part.late else UserError)(fault)
    return Lifelines(part.peers, first=job.process_id == 0, seconds=timeout_seconds)


# ------------------------------------------------------------------ process 0
class _Call(NamedTuple):
    """A process that has called, and its connection."""

    who: Introduction
    connection: socket.socket


@dataclasses.dataclass
class _Pending:
    """A connection that has not said who it is."""

    nonce: str
    deadline: float
    received: bytes = b""


def _in_short(names: list[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class _Counter:
    """Process 0: collects the others' calls side by side, and answers all at once."""

    def __init__(self, job: Job, deadline: float):
        self._job, self._start, self._deadline = job, time.monotonic(), deadline
        self._port = int(job.coordinator_address.rpartition(":")[2])
        self._calls: dict[int, _Call] = {}
        self._pending: dict[socket.socket, _Pending] = {}  # oldest first
        self._strangers = 0  # calls with another token
        self._fault = ""
        self.late = False  # True if the fault is that processes did not come in time
        self.peers: dict[int, Peer] = {}  # once all are there

    def run(self) -> str:
        """Returns what is wrong, "" if all processes are there."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        backlog = min(self._job.num_processes + MAX_PENDING, 4096)
        try:
            server = socket.create_server(
                ("", self._port), family=family, backlog=backlog, dualstack_ipv6=dual
            )
        except OSError as error:
            return (
                f"process 0 could not listen on port {self._port} ({error.strerror}); choose a "
                "free one by --coordinator_address"
            )
        with server, selectors.DefaultSelector() as selector:
            server.setblocking(False)
            selector.register(server, selectors.EVENT_READ)
            try:
                self._collect(server, selector)
                if not self._fault:
                    self._fault = self._missing()
                    self.late = bool(self._fault)
            finally:
                for connection in list(self._pending):
                    self._drop(connection, selector)
            self._answer()
        return self._fault

    def _collect(self, server: socket.socket, selector: selectors.BaseSelector) -> None:
        while len(self._calls) < self._job.num_processes - 1 and not self._fault:
            now = time.monotonic()
            for connection, pending in list(self._pending.items()):
                if pending.deadline <= now:
                    self._drop(connection, selector)
            if now >= self._deadline:
                return
            until = min([self._deadline, *(p.deadline for p in self._pending.values())])
            for key, _ in selector.select(max(0.001, until - now)):
                if key.fileobj is server:
                    self._accept(server, selector)
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._pending:
                    self._read(key.fileobj, selector)

    def _accept(self, server: socket.socket, selector: selectors.BaseSelector) -> None:
        if len(self._pending) >= MAX_PENDING:
            self._drop(next(iter(self._pending)), selector)
        try:
            connection, _ = server.accept()
        except OSError:  # gone already, or too many files are open
            if self._pending:
                self._drop(next(iter(self._pending)), selector)
            time.sleep(0.01)
            return
        connection.setblocking(False)
        probe(connection)  # a host that lost its power hangs up too
        pending = _Pending(handshake.new_nonce(), time.monotonic() + CALL_SECONDS)
        self._pending[connection] = pending
        selector.register(connection, selectors.EVENT_READ)
        try:
            connection.send(handshake.greeting(pending.nonce))
        except OSError:
            self._drop(connection, selector)

    def _read(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        pending = self._pending[connection]
        try:
            part = connection.recv(LINE_BYTES + 1 - len(pending.received))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        pending.received += part
        line, newline, _ = pending.received.partition(b"\n")
        if not newline and part and len(line) <= LINE_BYTES:
            return
        try:
            if not newline:
                raise ValueError("no line")
            who = handshake.parse_introduction(line, pending.nonce, self._job.token)
        except ValueError as error:  # not one of ours
            self._strangers += isinstance(error, WrongToken)
            self._drop(connection, selector)
            return
        del self._pending[connection]
        selector.unregister(connection)
        self._count(_Call(who, connection))

    def _count(self, call: _Call) -> None:
        number, count, host, _ = call.who
        earlier = self._calls.get(number)
        if earlier is not None and _hung_up(earlier.connection):
            earlier.connection.close()  # the process was started again
            earlier = None
        if count != self._job.num_processes:
            self._fault = (
                "expected the same --num_processes everywhere, found "
                f"{self._job.num_processes} on process 0 and {count} on process {number} ({host})"
            )
        elif earlier is not None:
            self._fault = (
                f"expected one process for each number, found --process_id={number} twice: on "
                f"{earlier.who.host} and on {host}"
            )
        # A call that is at fault is answered too, beside the one before it.
        self._calls[-number if self._fault else number] = call

    def _missing(self) -> str:
        hosts = {0: handshake.this_host()}
        hosts |= {number: call.who.host for number, call in self._calls.items()}
        missing = [str(n) for n in range(self._job.num_processes) if n not in hosts]
        if not missing:
            return ""
        there = [f"{number} ({host})" for number, host in sorted(hosts.items())]
        strangers = f", {self._strangers} calls with another --job_token" * bool(self._strangers)
        return (
            f"expected {self._job.num_processes} processes within "
            f"{time.monotonic() - self._start:.0f} s, found {_in_short(there, SHOWN)}{strangers}; "
            f"missing: {_in_short(missing, 2 * SHOWN)}; look at their logs, and whether they reach "
            f"port {self._port} here; the same command tries again"
        )

    def _answer(self) -> None:
        """Tells all; after a fault also waits until they hang up: the port must be free at once."""
        deadline = time.monotonic() + HANG_UP_SECONDS
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            for number, call in self._calls.items():
                if self._fault:
                    stack.enter_context(call.connection)
                else:
                    self.peers[number] = Peer(call.who.host, call.connection)
                line = handshake.answer(
                    self._fault, call.who.nonce, self._job.token, late=self.late
                )
                with contextlib.suppress(OSError):
                    call.connection.send(line)
                    if self._fault:
                        selector.register(call.connection, selectors.EVENT_READ)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    selector.unregister(key.fileobj)

    def _drop(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        del self._pending[connection]
        selector.unregister(connection)
        connection.close()


def _hung_up(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


# ------------------------------------------------------------------ the others
class _Caller:
    """Another process: calls process 0 until it answers."""

    def __init__(self, job: Job, deadline: float):
        self._job, self._start, self._deadline = job, time.monotonic(), deadline
        host, _, port = job.coordinator_address.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self.late = False  # True if the fault is that processes did not come in time
        self.peers: dict[int, Peer] = {}  # process 0 alone, once all are there

    def run(self) -> str:
        """Returns what process 0 says is wrong, "" if nothing, or that it does not answer."""
        reason = ""
        while True:
            try:
                with contextlib.ExitStack() as stack:
                    call = socket.create_connection((self._host, self._port), CALL_SECONDS)
                    stack.enter_context(call)
                    if not (fault := self._ask(call)):
                        stack.pop_all()
                        self.peers[0] = Peer(visible(self._host, 64), call)
                    return fault
            except (OSError, ValueError) as error:
                if isinstance(error, ValueError) or not reason:
                    reason = visible(error, 200)  # what somebody said there tells more
                if time.monotonic() > self._deadline:
                    self.late = True
                    return (
                        f"process {self._job.process_id} expected process 0 at {self._host}:"
                        f"{self._port} within {time.monotonic() - self._start:.0f} s, found nobody "
                        f"({reason}); missing: 0; check --coordinator_address, that "
                        "process 0 runs and that its port is open; the same command tries again"
                    )
                time.sleep(0.2)

    def _ask(self, call: socket.socket) -> str:
        job = self._job
        nonce = handshake.parse_greeting(handshake.read_line(call, time.monotonic() + CALL_SECONDS))
        who = Introduction(
            job.process_id, job.num_processes, handshake.this_host(), handshake.new_nonce()
        )
        call.sendall(handshake.introduce(who, nonce, job.token))
        # Process 0 answers at its own deadline, which may be later than ours.
        wait = 2 * max(1.0, self._deadline - self._start)
        line = handshake.read_line(call, time.monotonic() + wait)
        fault, self.late = handshake.parse_answer(line, who.nonce, job.token)
        return visible(fault, LINE_BYTES)
