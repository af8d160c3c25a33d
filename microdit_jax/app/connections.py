"""Connections to the page: bounded in number, and in the time they may stand still.

uvicorn bounds a head's size and closes a connection that stays idle after an answer. It waits for
ever for a first request, for the rest of a half one, and for a client that does not read.
"""

import asyncio
import logging
import os
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from microdit_jax.errors import UserError
from microdit_jax.machine import open_files

SPARE_FILES = 16  # for models, images and logs, beside the connections
LEAST_CONNECTIONS = 4  # a browser opens about so many for one page


class BoundedConnection(H11Protocol):
    """HTTP/1.1 for uvicorn, with deadlines for a request's head and for a client to read.

    Where there are too many connections, the one that has waited longest without a request makes
    room for the new one: strangers that open many and say nothing lock nobody out.
    """

    head_seconds = 10.0
    unread_seconds = 60.0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_deadline: asyncio.TimerHandle | None = None
        self._read_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Makes room for the connection, and begins to wait for its request."""
        super().connection_made(transport)
        limit = self.limit_concurrency
        if limit is not None and len(self.connections) >= limit:
            waiting = [c for c in self.connections if isinstance(c, BoundedConnection) and c.waits]
            if waiting:
                oldest = min(waiting, key=BoundedConnection.waiting_until)
                self.connections.discard(oldest)  # uvloop tells of its end later
                oldest.transport.abort()
        self._await_head()

    @property
    def waits(self) -> bool:
        """True while no request is whole."""
        return self._head_deadline is not None and not self.transport.is_closing()

    def waiting_until(self) -> float:
        """Returns the deadline of the request's head, on the loop's clock."""
        return self._head_deadline.when() if self._head_deadline else float("inf")

    def data_received(self, data: bytes) -> None:
        """Stops waiting once a request's head is whole, and waits for the next one behind it."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_head()
        else:
            _cancel(self._head_deadline)
            self._head_deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the deadlines."""
        _cancel(self._head_deadline)
        self._head_deadline = None
        _cancel(self._read_deadline)
        self._read_deadline = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begins to wait for a client that does not read."""
        super().pause_writing()
        if self._read_deadline is None:
            self._read_deadline = self.loop.call_later(self.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Forgets that the client did not read."""
        _cancel(self._read_deadline)
        self._read_deadline = None
        super().resume_writing()

    def _await_head(self) -> None:
        if self._head_deadline is None:  # more bytes of the same head do not move it
            self._head_deadline = self.loop.call_later(self.head_seconds, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def possible_connections(wanted: int) -> int:
    """Returns how many connections the limit of open files lets us have, at most `wanted`.

    Raises:
      UserError: too few for one browser.
    """
    limit = open_files.raise_limit()
    lowest_free = os.dup(0)
    os.close(lowest_free)
    left = limit - lowest_free - SPARE_FILES if limit >= 0 else wanted
    if left < LEAST_CONNECTIONS:
        raise UserError(
            f"the page needs {LEAST_CONNECTIONS} connections or more, found room for {max(left, 0)}"
            f" under the limit of {limit} open files; raise it (ulimit -n)"
        )
    return min(wanted, left)


class Rarely(logging.Filter):
    """Lets a kind of message through once a minute: strangers must not fill the log."""

    def __init__(self, seconds: float = 60.0):
        super().__init__()
        self._seconds, self._last = seconds, dict[str, float]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns True if the message may pass; a defect's traceback always may."""
        if record.exc_info and record.name != "asyncio":  # a defect of ours
            return True
        now = time.monotonic()
        if now - self._last.get(str(record.msg), -self._seconds) < self._seconds:
            return False
        if len(self._last) > 1000:
            self._last.clear()
        self._last[str(record.msg)] = now
        return True
