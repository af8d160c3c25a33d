"""HTTP around the studio: the page's files, its choices, requests to sample, finished images."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

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
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def listener(event: dict[str, Any]) -> None:
            if events.qsize() >= studio.limits.unread_events:
                event = {key: value for key, value in event.items() if key != "previews"}
            if not loop.is_closed():  # the server may be gone before the job
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            asked = read_request(_parse(bytes(body)), studio.models, studio.limits)
            job = studio.submit(asked, listener)
        except UserError as error:
            return _refused(str(error), 400)

        async def lines() -> AsyncIterator[str]:
            try:
                while True:
                    event = await events.get()
                    yield json.dumps(event) + "\n"
                    if event["event"] in ("done", "error"):
                        return
            finally:  # also when the page is closed, or its Stop was pressed
                job.cancel()

        return StreamingResponse(lines(), media_type="application/x-ndjson", headers=SAFE)

    async def image(request: Request) -> Response:
        found = studio.image(request.path_params["name"])
        if found is None:
            return _refused("this image is no longer kept; sample it again", 404)
        # Some names have no letter that a header can hold.
        name = re.sub(r"[^\w.-]", "", found.file_name, flags=re.ASCII)
        headers = SAFE | {
            "Content-Disposition": f'inline; filename="{name}"',
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
            Route("/images/{name}", image),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
    )


def _refused(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=SAFE)


def _parse(body: bytes) -> Any:
    try:
        return parse_json(body)
    except ValueError as error:
        raise UserError("expected JSON, found something else") from error
