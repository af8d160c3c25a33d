"""Readers of what comes over a network: lines of the preflight, requests of the page."""

from fuzz.grammar import after_a_byte, json_document
from fuzz.scratch import Scratch
from fuzz.targets import Read, Target
from microdit_jax.app import limits, server
from microdit_jax.errors import UserError
from microdit_jax.machine import handshake

NONCE, TOKEN = "0" * 32, "the job's own"


def _open_page_request(scratch: Scratch) -> Read:
    bounds = limits.Limits()

    def read(data: bytes) -> None:
        limits.read_request(server._parse(data), ["instant", "runs/mine"], bounds)

    return read


def _open_preflight(scratch: Scratch) -> Read:
    parsers = (
        handshake.parse_greeting,
        lambda line: handshake.parse_introduction(line, NONCE, TOKEN),
        lambda line: handshake.parse_answer(line, NONCE, TOKEN)[0],
    )

    def read(data: bytes) -> None:
        # The first byte chooses the line; the reader has cut it off at this length.
        found = parsers[data[0] % 3 if data else 0](data[1 : handshake.LINE_BYTES])
        shown = str(found)
        assert len(shown) <= handshake.LINE_BYTES, "a line that grew"

    return read


TARGETS = {
    "preflight": Target(
        _open_preflight,
        (ValueError,),
        (
            b'"process_id":',
            b'"num_processes":',
            b'"host":"',
            b'"nonce":"',
            b'"proof":"',
            b'"fault":"',
            b"1e9",
            b"null",
            b"\\ud800",
        ),
        after_a_byte(json_document),
    ),
    "page_request": Target(
        _open_page_request,
        (UserError,),
        (
            b'"model":"instant"',
            b'"prompt":"',
            b'"guidance_scale":',
            b'"num_inference_steps":',
            b'"seed":',
            b'"count":',
            b"1e999",
            b"NaN",
            b"\\ud800",
        ),
        json_document,
    ),
}
