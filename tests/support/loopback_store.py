"""A store that answers as one far away, or as one that refuses: GCS's and S3's reads, on loopback.

  python tests/support/loopback_store.py FOLDER SECONDS

serves the files of FOLDER as objects of any bucket, each answer SECONDS after its request, and
prints its port. GET /count tells how many reads of contents there were and
of how many bytes. GET /refuse/KIND makes all further answers that refusal of `REFUSALS`,
/refuse/none ends it.
"""

import asyncio
import json
import mmap
import pathlib
import re
import sys
import urllib.parse

_DATE = "2026-01-01T00:00:00.000Z"
_OBJECT = re.compile(r"/(?:download/)?storage/v1/b/[^/]+/o/(.+)|/[^/]+/(.+)")
_BUCKET = re.compile(r"/storage/v1/b/[^/]+(/o)?|/[^/]+/?")
_RANGE = re.compile(rb"(?i)\r\nrange: bytes=(\d+)-(\d*)")
_REGION = (
    "<Error><Code>PermanentRedirect</Code><Message>The bucket is in another region and must be "
    "addressed using the specified endpoint.</Message></Error>"
)
_DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_MALFORMED = (
    "<Error><Code>AuthorizationHeaderMalformed</Code><Message>The region 'us-east-1' is wrong; "
    "expecting 'eu-central-1'</Message><Region>eu-central-1</Region></Error>"
)
_GONE = "<Error><Code>NoSuchBucket</Code><Message>The bucket does not exist</Message></Error>"


def _json(code: int, message: str) -> str:
    return json.dumps({"error": {"code": code, "message": message}})


REFUSALS = {
    "gs403": (403, _json(403, "does not have storage.objects.get access")),
    "gs401": (401, _json(401, "Anonymous caller does not have storage.objects.get access")),
    "gs404": (404, _json(404, "The specified bucket does not exist.")),
    "gs503": (503, _json(503, "Backend Error")),
    "s3403": (403, _DENIED),
    "s3404": (404, _GONE),
    "s3301": (301, _REGION),
    "s3400": (400, _MALFORMED),
    "s3503": (503, "<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"),
}


class Store:
    """State that all connections share."""

    def __init__(self, folder: pathlib.Path, seconds: float):
        self.folder, self.seconds = folder, seconds
        self.refusal, self.reads, self.sent = "none", 0, 0
        self._maps: dict[str, memoryview] = {}

    def contents(self, name: str) -> memoryview | None:
        """Returns an object's bytes, None if there is no such object."""
        if name not in self._maps and (self.folder / name).is_file():
            with (self.folder / name).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._maps[name] = memoryview(mapped)
        return self._maps.get(name)

    def answer(self, head: bytes) -> tuple[int, bytes | memoryview, str]:
        """Returns the status, the body and further headers of a request's answer."""
        method, target = head.split(b"\r\n", 1)[0].decode().split(" ")[:2]
        url = urllib.parse.urlsplit(target)
        if url.path == "/count":
            return 200, json.dumps({"reads": self.reads, "bytes": self.sent}).encode(), ""
        if url.path.startswith("/refuse/"):
            self.refusal = url.path.rpartition("/")[2]
            return 200, b"", ""
        if self.refusal != "none":
            status, text = REFUSALS[self.refusal]
            region = "x-amz-bucket-region: eu-central-1\r\n" if "egion" in text else ""
            return status, text.encode(), region
        found = None if _BUCKET.fullmatch(url.path) else _OBJECT.fullmatch(url.path)
        if found is None:  # the bucket itself
            return 200, b'{"name": "bucket"}' if "/b/" in url.path else b"<ListBucketResult/>", ""
        name = urllib.parse.unquote(found[1] or found[2])
        is_gs = bool(found[1])
        data = self.contents(name)
        if data is None:
            text = (
                _json(404, "No such object") if is_gs else "<Error><Code>NoSuchKey</Code></Error>"
            )
            return 404, text.encode(), ""
        if is_gs and "alt=media" not in url.query:
            about = {"name": name, "bucket": "bucket", "size": str(len(data)), "generation": "1",
                     "timeCreated": _DATE, "updated": _DATE}  # fmt: skip
            return 200, json.dumps(about).encode(), ""
        status, more = 200, ""
        if asked := _RANGE.search(head):
            begin, size = int(asked[1]), len(data)
            end = min(size, int(asked[2]) + 1) if asked[2] else size
            if begin >= size:
                return 416, b"", ""
            status, more = 206, f"Content-Range: bytes {begin}-{end - 1}/{size}\r\n"
            data = data[begin:end]
        if method != "HEAD":
            self.reads += 1
            self.sent += len(data)
        return status, data, more


class Connection(asyncio.Protocol):
    """One connection, whose requests are answered in order."""

    def __init__(self, store: Store):
        self._store, self._left = store, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._left += data
        while (end := self._left.find(b"\r\n\r\n")) >= 0:
            head, self._left = self._left[:end], self._left[end + 4 :]
            asyncio.get_running_loop().call_later(self._store.seconds, self._send, head)

    def _send(self, head: bytes) -> None:
        status, body, more = self._store.answer(head)
        self._transport.write(
            f'HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nETag: "1"\r\n'
            "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nx-goog-generation: 1\r\n"
            f"{more}\r\n".encode()
        )
        if not head.startswith(b"HEAD"):
            self._transport.write(body)


async def serve(store: Store) -> None:
    """Serves for ever on a free port, which is printed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(store), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(Store(pathlib.Path(sys.argv[1]), float(sys.argv[2]))))
