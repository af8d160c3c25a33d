"""Connections that say nothing, or do not read, on a real socket."""

import asyncio
import contextlib
import logging
import socket

import pytest
import uvicorn

from microdit_jax.app import connections
from microdit_jax.app.connections import BoundedConnection, Rarely
from microdit_jax.errors import UserError

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Impatient(BoundedConnection):
    head_seconds = 0.5
    unread_seconds = 0.5


async def long_answer(scope, receive, send):
    """Answers "ok" at "/", and 128 MB at any other path."""
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(0 if scope["path"] == "/" else 2000):
        await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def serving(limit=200):
    config = uvicorn.Config(
        long_answer, port=0, http=Impatient, lifespan="off", log_level="critical",
        limit_concurrency=limit, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server.server_state.connections
    finally:
        server.should_exit = True
        await task


async def ask(port) -> bytes:
    reader, writer = await asyncio.open_connection("localhost", port)
    writer.write(GET)
    try:
        return await asyncio.wait_for(reader.readuntil(b"ok"), 10)
    finally:
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET / HT", GET + b"GET / HT"])
def test_a_request_that_never_comes(sent):
    async def run():
        async with serving() as (port, opened):
            reader, writer = await asyncio.open_connection("localhost", port)
            writer.write(sent)
            with contextlib.suppress(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 10)
            writer.close()

    asyncio.run(run())


def test_more_bytes_do_not_move_the_deadline():
    async def run():
        async with serving() as (port, opened):
            reader, writer = await asyncio.open_connection("localhost", port)
            end = asyncio.create_task(reader.read())
            for _ in range(100):
                writer.write(b"G")
                if (await asyncio.wait([end], timeout=0.1))[0]:
                    break
            assert end.done()
            with contextlib.suppress(ConnectionResetError):
                await end
            writer.close()

    asyncio.run(run())


def test_a_crowd_that_says_nothing_locks_nobody_out():
    async def run():
        async with serving(limit=8) as (port, opened):
            crowd = [await asyncio.open_connection("localhost", port) for _ in range(40)]
            for _, writer in crowd:
                writer.write(b"GET / HT")
            assert (await ask(port)).startswith(b"HTTP/1.1 200")
            for _, writer in crowd:
                writer.close()

    asyncio.run(run())


def test_a_client_that_does_not_read():
    async def run():
        async with serving() as (port, opened):
            with socket.create_connection(("localhost", port)) as connection:
                connection.sendall(GET.replace(b"/ ", b"/long ", 1))
                # Nothing is read, so the answer stops on its way, and after a while is given up.
                async with asyncio.timeout(20):
                    while not opened:
                        await asyncio.sleep(0.01)
                    while opened:
                        await asyncio.sleep(0.01)
            assert (await ask(port)).startswith(b"HTTP/1.1 200")

    asyncio.run(run())


def test_connections_fit_under_the_limit_of_open_files(monkeypatch):
    monkeypatch.setattr(connections.open_files, "raise_limit", lambda: 100_000)
    assert connections.possible_connections(200) == 200
    monkeypatch.setattr(connections.open_files, "raise_limit", lambda: 3)
    with pytest.raises(UserError, match="limit of 3 open files; raise it"):
        connections.possible_connections(200)


def test_a_message_comes_once_a_minute():
    rarely, record = Rarely(), logging.makeLogRecord({"msg": "a", "name": "uvicorn.error"})
    assert [rarely.filter(record) for _ in range(3)] == [True, False, False]
    assert rarely.filter(logging.makeLogRecord({"msg": "b"}))
    fault = logging.makeLogRecord({"msg": "a", "exc_info": (ValueError, ValueError(), None)})
    assert rarely.filter(fault)  # a defect is always told
