"""Connections that tell who is gone after the preflight and before JAX has joined the processes.

JAX's own client would wait until its time-out, and then abort with pages of C++ that name nobody.
A process that ends, however it does, closes its connection; one that is stopped does not; a host
that falls silent is given up as the watch does it later (machine.watch).
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from microdit_jax.errors import visible
from microdit_jax.machine import interrupts

JOINED = b"joined\n"
LINE_BYTES = 4096
PROBE_SECONDS, PROBES = 5, 5  # of a connection on which nothing comes
TELL_SECONDS = 5.0  # for process 0 to be the one that tells all that the time is up
_LOOK_SECONDS = 0.2


class Peer(NamedTuple):
    """Another process, and the connection to it."""

    host: str
    connection: socket.socket


def _end(line: str) -> None:
    interrupts.end_with(line, interrupts.STOPPED_EARLY)


class Lifelines:
    """Ends this process by name if another one ends within the `with` block.

    Process 0 has a connection to each, all others have one to process 0, which tells them.

    Args:
      peers: by number.
      first: True on process 0.
      seconds: for all to join, since one that stands still hangs up no connection.
      end: called with the line in a thread.
    """

    def __init__(
        self,
        peers: Mapping[int, Peer],
        *,
        first: bool,
        seconds: float = 300.0,
        end: Callable[[str], None] = _end,
    ):
        self._peers, self._first, self._end = dict(peers), first, end
        self._seconds = seconds if first else seconds + TELL_SECONDS
        self._joined = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lifelines", daemon=True)

    def __enter__(self) -> "Lifelines":
        for peer in self._peers.values():
            peer.connection.settimeout(float(PROBE_SECONDS))
            probe(peer.connection)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        self._joined.set()
        self._thread.join()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                if kind is None:
                    peer.connection.sendall(JOINED)
            peer.connection.close()

    def _watch(self) -> None:
        until = time.monotonic() + self._seconds
        with selectors.DefaultSelector() as selector:
            for number, peer in self._peers.items():
                selector.register(peer.connection, selectors.EVENT_READ, number)
            while selector.get_map() and not self._joined.is_set():
                for key, _ in selector.select(_LOOK_SECONDS):
                    line = self._line(key.data)
                    if line == JOINED:
                        selector.unregister(key.fileobj)
                    elif not self._joined.is_set():
                        self._leave(key.data, line)
                        return
                if time.monotonic() > until and not self._joined.is_set():
                    self._tell_and_end(
                        f"expected all processes, which had called, to join within "
                        f"{self._seconds:.0f} s, found one that stands still; look at their logs; "
                        "the same command tries again"
                    )
                    return

    def _line(self, number: int) -> bytes:
        """Returns what a process has to say; b"" where it is gone."""
        received = b""
        with contextlib.suppress(OSError):
            while not received.endswith(b"\n") and len(received) < LINE_BYTES:
                part = self._peers[number].connection.recv(LINE_BYTES)
                if not part:
                    return b""
                received += part
        return received

    def _leave(self, number: int, said: bytes) -> None:
        line = visible(said.rstrip(b"\n"), LINE_BYTES)
        if self._first or not said:
            host = self._peers[number].host
            line = (
                f"process {number} ({host}) is gone before all had joined; the same command goes on"
            )
        self._tell_and_end(line)

    def _tell_and_end(self, line: str) -> None:
        if self._first:
            for peer in self._peers.values():  # the one that is gone does not hear it
                with contextlib.suppress(OSError):
                    peer.connection.sendall(line.encode() + b"\n")
        self._end(line)


def probe(connection: socket.socket) -> None:
    """Lets the system ask for signs of life, which a process that is stopped still gives.

    Without an answer the connection fails after half a minute.
    """
    with contextlib.suppress(OSError, AttributeError):  # macOS names one of them otherwise
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES - 1)
