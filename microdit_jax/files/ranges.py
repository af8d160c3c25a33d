"""Ranges of bytes of objects at a URL, many on their way at a time.

gs:// and s3:// are read by tensorstore, which Orbax brings: its threads are C++'s, so that a record
costs the interpreter next to nothing, and Amazon's signatures a fifth of what they cost in Python.
What it cannot read goes through fsspec, as everything else does, which also names what is wrong.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from microdit_jax.errors import visible
from microdit_jax.files.attempts import BucketError, say
from microdit_jax.files.bucket import Bucket
from microdit_jax.files.urls import scheme_of

AT_ONCE = 128  # requests on their way, of each reader
_SECONDS = 60.0  # for which tensorstore may be silent before fsspec tries


class Range(NamedTuple):
    """Bytes of an object from `start` up to `end`, which is not among them."""

    name: str
    start: int
    end: int


class RangeReader:
    """Reads ranges of the objects below a URL; safe in threads."""

    def __init__(self, url: str):
        """Opens nothing yet.

        Args:
          url: a folder at any URL that fsspec reads.
        """
        self._bucket = Bucket(url)
        self._fast: Any = None
        self._opened = False
        self._lock = threading.Lock()

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """Reads all ranges, and returns their bytes in the same order.

        A store that is away is waited for, with a line each time (`attempts`).

        Raises:
          BucketError: an object that is not there or not to be read, or ends before its range.
        """
        found: dict[int, bytes] = {}
        left = self._read_fast(ranges, range(len(ranges)), found)
        while left and self._store() is not None:
            # The one that failed first finds out why, and waits; the others need not ask too.
            first, *left = left
            found[first] = self._read_slowly(ranges[first])
            before = len(left)
            left = self._read_fast(ranges, left, found)
            if len(left) == before > 0:
                self._give_up(ranges[left[0]])
        if left:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                read = pool.map(lambda i: self._read_slowly(ranges[i]), left)
                found.update(zip(left, read, strict=True))
        return [found[i] for i in range(len(ranges))]

    def _read_fast(
        self, ranges: Sequence[Range], numbers: Sequence[int], found: dict[int, bytes]
    ) -> list[int]:
        """Adds to `found` what tensorstore reads; returns the numbers of the ranges it does not."""
        store = self._store()
        if store is None:
            return list(numbers)
        failed, futures = [], {}
        for i in numbers:
            name, start, end = ranges[i]
            try:
                futures[i] = store.read(name, byte_range=slice(start, end))
            except Exception:  # of C++, without a common class
                failed.append(i)
        for i, future in futures.items():
            try:
                result = future.result(timeout=_SECONDS)
            except Exception:
                failed.append(i)
                continue
            data = result.value if result.state == "value" else b""
            if len(data) == ranges[i].end - ranges[i].start:
                found[i] = data
            else:
                failed.append(i)
        return sorted(failed)

    def _read_slowly(self, wanted: Range) -> bytes:
        data = self._bucket.read_range(*wanted)
        if len(data) != wanted.end - wanted.start:
            raise BucketError(
                f"expected the bytes {wanted.start:,} to {wanted.end:,} in "
                f"{self._bucket.url}/{visible(wanted.name)}, found {len(data):,} of them; the file "
                "was cut off or replaced: copy it again",
                "other",
            )
        return data

    def _store(self) -> Any:
        """Returns tensorstore's view of the folder, None where fsspec reads."""
        with self._lock:
            if not self._opened:
                self._opened = True
                self._fast = _open(self._bucket.url)
            return self._fast

    def _give_up(self, wanted: Range) -> None:
        with self._lock:
            if self._fast is not None:
                say(f"{self._bucket.url}: tensorstore cannot read {wanted.name}, but fsspec can; "
                    "it goes on, with a fraction of the throughput")  # fmt: skip
            self._fast = None


def _open(url: str) -> Any:
    """Opens a folder for tensorstore; None where it cannot read that store."""
    scheme = scheme_of(url)
    if scheme not in ("gs", "s3"):
        return None
    try:
        import tensorstore  # a tenth of a second
    except ImportError:
        return None
    bucket, _, path = url.removeprefix(f"{scheme}://").partition("/")
    path = f"{path.rstrip('/')}/" if path.strip("/") else ""
    driver = "gcs" if scheme == "gs" else "s3"
    # Two quick tries: what lasts longer is waited for by `attempt`, with a line for who watches.
    context = {
        f"{driver}_request_concurrency": {"limit": AT_ONCE},
        f"{driver}_request_retries": {"max_retries": 2, "initial_delay": "50ms"},
    }
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": path, "context": context}
    if scheme == "gs" and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    if scheme == "s3" and "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}  # without a word about ~/.aws
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    try:
        return tensorstore.KvStore.open(spec).result(timeout=_SECONDS)
    except Exception:
        return None
