"""HTTP around the studio: the page's files, its choices, requests to sample, finished images."""

import asyncio
import contextlib
import json
import re
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from microdit_jax.app.following import Followed, Jobs
from microdit_jax.app.limits import read_request
from microdit_jax.app.studio import Studio
from microdit_jax.errors import UserError
from microdit_jax.files import parse_json

PAGE = Path(__file__).parent / "page"
# The only files that are served: nothing that comes in is ever used as a path.
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/edit.js": ("edit.js", "text/javascript"),
    "/gallery.js": ("gallery.js", "text/javascript"),
    "/zip.js": ("zip.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
SAFE = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(studio: Studio, choices: dict[str, Any], hosts: list[str]) -> Starlette:
    """Returns the web application.

    Args:
      choices: models, defaults and limits, which the page asks for when it is opened.
      hosts: names under which the page may be asked for; another site that points its own name to
        this machine is refused. "*" takes any.
    """

    jobs = Jobs(studio.limits)

    async def sample(request: Request) -> Response:
        # A form of another site cannot send this type without the browser asking here first.
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return _refused("expected application/json", 415)
        body = bytearray()
        try:
            async with asyncio.timeout(studio.limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > studio.limits.body_bytes:
                        return _refused(
                            "the request is too long; shorten the prompt, or give a smaller image",
                            413,
                        )
        except TimeoutError:
            return _refused("the request came in too slowly; send it again", 408)
        except ClientDisconnect:
            return _refused("the request was cut off", 400)
        try:
            asked = read_request(_parse(bytes(body)), studio.models, studio.limits)
            followed = jobs.begin(lambda told: studio.submit(asked, told), keep=asked.keep)
        except UserError as error:
            return _refused(str(error), 400)
        return _stream(followed)

    async def job(request: Request) -> Response:
        followed = jobs.get(request.path_params["name"])
        if followed is None:
            return _refused("this request is no longer known; send it again", 404)
        if request.method == "DELETE":
            followed.cancel()
            return Response(status_code=204, headers=SAFE)
        return _stream(followed)

    async def image(request: Request) -> Response:
        found = studio.image(request.path_params["name"])
        if found is None:
            return _refused("this image is no longer kept; sample it again", 404)
        # Old browsers read the first name, which has the letters that a header can hold.
        name = re.sub(r"[^\w.-]", "", found.file_name, flags=re.ASCII)
        whole = urllib.parse.quote(found.file_name, safe="")
        headers = SAFE | {
            "Content-Disposition": f"inline; filename=\"{name}\"; filename*=UTF-8''{whole}",
            "Cache-Control": "private, max-age=86400, immutable",
        }
        return Response(found.png, media_type="image/png", headers=headers)

    async def choose(request: Request) -> Response:
        return JSONResponse(choices, headers=SAFE)

    def page(file: str, media_type: str):
        async def answer(request: Request) -> Response:
            return Response((PAGE / file).read_bytes(), media_type=media_type, headers=SAFE)

        return answer

    return Starlette(
        routes=[
            *(Route(path, page(*file)) for path, file in FILES.items()),
            Route("/choices", choose),
            Route("/sample", sample, methods=["POST"]),
            Route("/jobs/{name}", job, methods=["GET", "DELETE"]),
            Route("/images/{name}", image),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
    )


def _stream(followed: Followed) -> Response:
    """Answers with a line of JSON for each event."""

    async def lines() -> AsyncIterator[str]:
        async with contextlib.aclosing(followed.events()) as events:
            async for event in events:
                yield json.dumps(event) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson", headers=SAFE)


def _refused(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=SAFE)


def _parse(body: bytes) -> Any:
    try:
        return parse_json(body)
    except ValueError as error:
        raise UserError("expected JSON, found something else") from error
