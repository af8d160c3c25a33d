"""Readers of what comes over a network: lines of the preflight, requests of the page."""

from fuzz.scratch import Scratch
from fuzz.targets import Read, Target
from microdit_jax.app import limits, server
from microdit_jax.errors import UserError


def _open_page_request(scratch: Scratch) -> Read:
    bounds = limits.Limits()

    def read(data: bytes) -> None:
        limits.read_request(server._parse(data), ["instant", "runs/mine"], bounds)

    return read


TARGETS = {
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
    ),
}
