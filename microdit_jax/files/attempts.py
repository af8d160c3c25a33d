"""Calls to an object store: tried for minutes with a line for whoever watches, and told apart.

Libraries raise all kinds of exceptions for the same few faults. What another try can mend (a server
that is away, too many requests) is tried again; what it cannot (no such object, no right) is an
error at once.
"""

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from microdit_jax.errors import LONGEST, UserError, visible

SECONDS = 300.0  # for which a call is tried again
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
# Without an answer, after which a line says so: libraries try again by themselves without a word.
SLOW_SECONDS, SLOW_SECONDS_OF_FILES = 3.0, 15.0

T = TypeVar("T")


class Fault(NamedTuple):
    """A fault in words, with the fix, and whether another try may help."""

    kind: str
    reason: str
    fix: str
    may_pass: bool = False


class BucketError(UserError):
    """A store that could not be read or written.

    Attributes:
      kind: "missing", "no bucket", "forbidden", "credentials", "region", "unreachable", "taken" or
        "other".
    """

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


def fault_of(error: BaseException) -> Fault:
    """Tells the fault behind an exception of fsspec's filesystems and what lies below them."""
    errors = _chain(error)
    names = {type(e).__name__ for e in errors}
    text = " ".join(str(e) for e in errors)
    code = next((c for e in errors if (c := _status(e))), 0)
    short = visible(" ".join(str(error).split()) or type(error).__name__, 200)
    if _any(text, "NoSuchBucket", "bucket does not exist", "Bucket not found"):
        return Fault("no bucket", "there is no such bucket", "check its name")
    if names & {"NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError"} or _any(
        text, "Unable to locate credentials", "default credentials were not found"
    ):
        return Fault(
            "credentials",
            "found no credentials",
            "log in (gcloud auth application-default login, aws configure), or set "
            "GOOGLE_APPLICATION_CREDENTIALS or AWS_ACCESS_KEY_ID",
        )
    region = next((r for e in errors if (r := _region(e))), "")
    # A redirection without the region's name leads the library in circles.
    if code in (301, 307) or region or "RecursionError" in names or _any(
        text, "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"
    ):  # fmt: skip
        return Fault(
            "region",
            f"the bucket is in another region ({region or short})",
            f"set AWS_DEFAULT_REGION to {region or 'it'}, and let AWS_ENDPOINT_URL lead there",
        )
    if isinstance(error, PermissionError) or code in (401, 403) or _any(
        text, "Forbidden", "AccessDenied", "Access Denied", "InvalidAccessKeyId",
        "SignatureDoesNotMatch", "Anonymous caller", "Unauthorized",
    ):  # fmt: skip
        return Fault("forbidden", f"no right to it ({short})", "ask for that right (status 403)")
    if isinstance(error, FileExistsError) or code in (409, 412) or "PreconditionFailed" in text:
        return Fault("taken", "another process changed it", "try again", may_pass=False)
    if isinstance(error, FileNotFoundError) or code == 404:
        return Fault("missing", "there is no such object", "check the path")
    if code == 429 or code >= 500 or _any(text, "SlowDown", "InternalError"):
        return Fault("other", f"the store answers {short}", "try again later", may_pass=True)
    if isinstance(error, ConnectionError | TimeoutError) or _any(
        " ".join(names), "Connect", "Timeout", "ServerDisconnected", "ClientOSError", "Payload",
        "ProxyError", "IncompleteRead", "ContentLength", "ResponseStreaming",
    ):  # fmt: skip
        return Fault(
            "unreachable", f"no connection ({short})", "check the network and its endpoint",
            may_pass=True,
        )  # fmt: skip
    return Fault("other", short, "check the path", may_pass="HttpError" in names and not code)


def attempt(
    what: str,
    call: Callable[[], T],
    *,
    seconds: float | None = None,
    slow_seconds: float = SLOW_SECONDS,
) -> T:
    """Calls until it succeeds or cannot; says on stderr what it waits for.

    Args:
      what: a URL, for messages.
      seconds: to try again for; SECONDS by default.
      slow_seconds: without an answer, after which a line says so.
    Raises:
      BucketError: a fault that stays.
    """
    until = time.monotonic() + (SECONDS if seconds is None else seconds)
    pause = _FIRST_PAUSE
    while True:
        try:
            with _told_if_slow(what, slow_seconds):
                return call()
        except (UserError, MemoryError):
            raise
        except Exception as error:
            fault = fault_of(error)
            left = until - time.monotonic()
            if not fault.may_pass or left < pause:
                raise BucketError(
                    f"could not use {what}: {fault.reason}; {fault.fix}", fault.kind
                ) from error
            say(f"{what}: {fault.reason}; tried again for {left:.0f} s more")
        time.sleep(pause * random.uniform(0.8, 1.2))
        pause = min(2 * pause, _LONGEST_PAUSE)


def say(line: str) -> None:
    """Prints a line on stderr."""
    print(visible(line, LONGEST), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _told_if_slow(what: str, seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, say, (f"{what}: no answer for {seconds:.0f} s; waiting",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _region(error: BaseException) -> str:
    """Returns the region that a refusal of S3's names, "" for none."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    refused = metadata.get("HTTPStatusCode") in (301, 307, 400)
    name = metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region", "") if refused else ""
    return visible(name, 40)


def _status(error: BaseException) -> int:
    """Returns the HTTP status that an exception carries, 0 for none."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    for code in (getattr(error, "code", None), getattr(error, "status", None),
                 metadata.get("HTTPStatusCode")):  # fmt: skip
        if str(code).isdigit() and 300 <= int(str(code)) < 600:
            return int(str(code))
    return 0


def _any(text: str, *words: str) -> bool:
    return any(word in text for word in words)
