"""Lines that processes of a job exchange before JAX joins them: short, and with a proof.

With a shared token each side proves that it knows it without sending it: process 0 begins with a
random number, and the others answer

  {"nonce": HEX}                                                   process 0, at once
  {"process_id", "num_processes", "host", "nonce": HEX, "proof"}   the others
  {"fault": TEXT, "late": BOOL, "proof"}                           process 0, when all are there

where a proof is an HMAC of the line and of the other side's number. Whoever reaches the port may
send anything: a line of other types or ranges raises ValueError.
"""

import hmac
import json
import re
import secrets
import socket
import time
from typing import Any, NamedTuple

from microdit_jax.files import parse_json

LINE_BYTES = 4096  # of a line, at most
MAX_PROCESSES = 1_000_000
HUNG_UP = "it hung up, as it does on another --job_token"
_HOST = re.compile(r"[\w.:?-]{1,64}", re.ASCII)
_NONCE = re.compile("[0-9a-f]{32}")


class WrongToken(ValueError):
    """A line of this job's form, by somebody who does not know its token."""


class Introduction(NamedTuple):
    """A process by its own words; its nonce is a random number to be answered."""

    process_id: int
    num_processes: int
    host: str
    nonce: str


def this_host() -> str:
    """Returns this machine's name, in the characters that a line may have."""
    return re.sub(r"[^\w.:-]", "?", socket.gethostname(), flags=re.ASCII)[:64] or "?"


def new_nonce() -> str:
    """Returns a random number of 128 bits in hexadecimal digits."""
    return secrets.token_hex(16)


def greeting(nonce: str) -> bytes:
    """Returns process 0's first line."""
    return _line(nonce=nonce)


def parse_greeting(line: bytes) -> str:
    """Reads the nonce of process 0's first line; raises ValueError."""
    nonce = _parse(line).get("nonce")
    if not isinstance(nonce, str) or not _NONCE.fullmatch(nonce):
        raise ValueError("another program listens there")
    return nonce


def introduce(introduction: Introduction, nonce: str, token: str) -> bytes:
    """Returns a process's line about itself, in answer to process 0's nonce."""
    return _line(**introduction._asdict(), proof=_proof(token, nonce, *introduction))


def parse_introduction(line: bytes, nonce: str, token: str) -> Introduction:
    """Reads a process's line; raises WrongToken, or ValueError for what is no such line."""
    said = _parse(line)
    number, count = _whole(said.get("process_id")), _whole(said.get("num_processes"))
    host, theirs = said.get("host"), said.get("nonce")
    if not (
        1 <= number < count <= MAX_PROCESSES
        and isinstance(host, str)
        and _HOST.fullmatch(host)
        and isinstance(theirs, str)
        and _NONCE.fullmatch(theirs)
    ):
        raise ValueError("no process of a job")
    introduction = Introduction(number, count, host, theirs)
    _check_proof(said.get("proof"), token, nonce, *introduction)
    return introduction


def answer(fault: str, nonce: str, token: str, *, late: bool = False) -> bytes:
    """Returns process 0's answer to an introduction with this nonce: a fault, or "" for none.

    Args:
      late: the fault is that processes did not come in time.
    """
    return _line(fault=fault, late=late, proof=_proof(token, nonce, fault, late))


def parse_answer(line: bytes, nonce: str, token: str) -> tuple[str, bool]:
    """Reads process 0's answer, the fault and `late`; raises WrongToken or ValueError."""
    said = _parse(line)
    fault, late = said.get("fault"), said.get("late")
    if not isinstance(fault, str) or not isinstance(late, bool):
        raise ValueError("no answer of a job")
    _check_proof(said.get("proof"), token, nonce, fault, late)
    return fault, late


def read_line(connection: socket.socket, deadline: float) -> bytes:
    """Reads one line and nothing behind it; raises OSError past the deadline (monotonic).

    What follows, such as a "joined" sent right behind the answer, stays on the connection for
    whoever reads it next (machine.lifelines).

    Raises:
      ValueError: for a long line, or one without an end.
    """
    received = b""
    while not received.endswith(b"\n"):
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError("no answer")
        connection.settimeout(left)
        there = connection.recv(LINE_BYTES + 1 - len(received), socket.MSG_PEEK)
        end = there.find(b"\n") + 1 or len(there)
        received += connection.recv(end) if there else b""
        if not there or len(received) > LINE_BYTES:
            raise ValueError("a line that is too long" if there else HUNG_UP)
    return received[:-1]


def _line(**contents: Any) -> bytes:
    return json.dumps(contents).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any]:
    contents = parse_json(line)
    if not isinstance(contents, dict):
        raise ValueError("a line that is no JSON object")
    return contents


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("no whole number")
    return value


def _proof(token: str, *parts: Any) -> str:
    return hmac.new(token.encode(), json.dumps(parts).encode(), "sha256").hexdigest()


def _check_proof(found: Any, token: str, *parts: Any) -> None:
    expected = _proof(token, *parts)
    if not isinstance(found, str) or not hmac.compare_digest(found.encode(), expected.encode()):
        raise WrongToken("it does not know this job's --job_token")
