"""Rows of Parquet and Arrow files, read in another process, which damage may end.

PyArrow's decoders are native code: some damaged pages keep them busy for ever, and a file that is
cut while it is mapped ends its process. So rows are asked of a process that takes one request after
the other, and is ended and replaced where it takes too long.
"""

import atexit
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from microdit_jax.files import parse_json
from microdit_jax.prepare.sources.column_files import read_rows

ROW_SECONDS = 60  # until the next row; whole batches are decoded at once
_MAX_MEMORY = 4 << 30  # bytes; mapped files do not count
_ROWS, _BYTES = 128, 1 << 20  # of one answer, at most a row more
_idle: list["_Reader"] = []
_lock = threading.Lock()


class DamagedRows(ValueError):
    """Rows that cannot be read; the text is a reason for the job's list."""


def rows(
    path: Path, groups: range, columns: Sequence[str]
) -> Generator[dict[str, Any], None, None]:
    """Yields the rows of some groups of a file, as `read_rows` does.

    Raises:
      DamagedRows: PyArrow refused them, was ended by them or needs too long for them.
    """
    with _lock:
        reader = _idle.pop() if _idle else None
    reader = reader or _Reader()
    try:
        yield from reader.rows(path, groups, columns)
    finally:
        if reader.is_ready:
            with _lock:
                _idle.append(reader)
        else:  # it was ended, or the caller wants no more of the rows that wait in the pipe
            reader.close()


class _Reader:
    """A process of `main`, for one request at a time.

    Attributes:
      is_ready: the last request was answered to its end.
    """

    def __init__(self) -> None:
        self.is_ready = True
        packages = str(Path(__file__).parents[3])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([packages, *filter(None, sys.path)])},
            start_new_session=True,  # Ctrl-C is for the job, which then ends this by closing a pipe
        )

    def rows(
        self, path: Path, groups: range, columns: Sequence[str]
    ) -> Generator[dict[str, Any], None, None]:
        """Yields rows of a file."""
        assert self._process.stdin and self._process.stdout
        self.is_ready = False
        request = {
            "path": os.fsencode(path).hex(),  # names need not be texts
            "groups": [groups.start, groups.stop],
            "columns": list(columns),
            "seconds": ROW_SECONDS,
        }
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise DamagedRows(self._end()) from error
        while line := self._process.stdout.readline():
            answer = parse_json(line)
            self.is_ready = "rows" not in answer
            if "end" in answer:
                return
            if "error" in answer:
                raise DamagedRows(answer["error"])
            yield from [_unpacked(row, self._process.stdout) for row in answer["rows"]]
        raise DamagedRows(self._end())

    def _end(self) -> str:
        """Tells how the process ended."""
        status = self._process.wait()
        if status == -signal.SIGALRM:
            return f"a row took longer than {ROW_SECONDS} s"
        return f"PyArrow ended with {signal.Signals(-status).name if status < 0 else status}"

    def close(self) -> None:
        """Ends the process, whatever it does."""
        assert self._process.stdin and self._process.stdout
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:  # a request that was not taken any more
            pass


@atexit.register
def close() -> None:
    """Ends the processes that wait for requests."""
    with _lock:
        while _idle:
            _idle.pop().close()


# ------------------------------------------------------------------ the other process
def main() -> None:
    """Answers requests on standard input until it is closed."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_MEMORY, _MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin.buffer:
        try:
            request = parse_json(line)
            signal.alarm(seconds := request["seconds"])
            for answer, blobs in _answers(request):
                signal.alarm(0)  # the job may take its time with rows
                answers.write(b"".join([json.dumps(answer).encode(), b"\n", *blobs]))
                answers.flush()
                signal.alarm(seconds)
            signal.alarm(0)  # until the next request
        except BrokenPipeError:
            return


def _answers(request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Yields what answers a request, each with the bytes that follow it."""
    found: list[Any] = []
    blobs: list[bytes] = []
    try:
        path = Path(os.fsdecode(bytes.fromhex(request["path"])))
        for row in read_rows(path, range(*request["groups"]), request["columns"]):
            found.append(_packed(row, blobs))
            if len(found) == _ROWS or sum(map(len, blobs)) > _BYTES:
                yield {"rows": found}, blobs
                found, blobs = [], []
        end: dict[str, Any] = {"end": True}
    except Exception as error:  # each is damage that the parent lists, by its kind
        end = {"error": type(error).__name__}
    yield {"rows": found}, blobs
    yield end, []


def _packed(value: Any, blobs: list[bytes]) -> Any:
    """Returns a value as JSON has it; bytes are put aside, to follow it."""
    if isinstance(value, bytes):
        blobs.append(value)
        return {"bytes": len(value)}
    if isinstance(value, dict):
        return {"fields": {key: _packed(item, blobs) for key, item in value.items()}}
    if isinstance(value, list):
        return [_packed(item, blobs) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}  # which JSON has no number for
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _unpacked(value: Any, file: IO[bytes]) -> Any:
    if isinstance(value, dict) and "bytes" in value:
        data = file.read(value["bytes"])
        if len(data) < value["bytes"]:
            raise DamagedRows("a row was cut")
        return data
    if isinstance(value, dict) and "float" in value:
        return float(value["float"])
    if isinstance(value, dict):
        return {key: _unpacked(item, file) for key, item in value["fields"].items()}
    if isinstance(value, list):
        return [_unpacked(item, file) for item in value]
    return value


if __name__ == "__main__":
    main()
