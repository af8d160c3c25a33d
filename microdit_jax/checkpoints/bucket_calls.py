"""Calls that Orbax makes to a bucket itself: tried for minutes, as all others are.

Orbax writes arrays through tensorstore, which tries again by itself, and the small files beside
them through etils' epath, which does not: five seconds without a network would end a run.
"""

import functools
import io
import os
from collections.abc import Callable
from typing import Any

from etils.epath import backend

from microdit_jax.files.attempts import BucketError, attempt
from microdit_jax.files.bucket import Bucket
from microdit_jax.files.urls import as_given, scheme_of

_CALLS = ("exists", "isdir", "listdir", "glob", "makedirs", "mkdir", "rmtree", "remove", "rename",
          "replace", "stat")  # fmt: skip


@functools.cache
def try_again() -> None:
    """Lets epath's calls to gs:// be tried again where that may help, from now on."""
    calls: Any = backend.fsspec_backend
    for name in _CALLS:
        setattr(calls, name, _tried(getattr(calls, name)))
    calls.open = _opened(calls.open)


def _tried(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def tried(path: str | os.PathLike, *arguments: Any, **options: Any) -> Any:
        if scheme_of(path) != "gs":
            return call(path, *arguments, **options)
        try:
            return attempt(as_given(path), lambda: call(path, *arguments, **options))
        except BucketError as error:
            if error.kind == "unreachable" or error.__cause__ is None:
                raise
            raise error.__cause__ from None  # callers ask by its type whether something is there

    return tried


def _opened(call: Callable[..., Any]) -> Callable[..., Any]:
    tried = _tried(call)

    @functools.wraps(call)
    def opened(path: str | os.PathLike, mode: str) -> Any:
        if scheme_of(path) != "gs" or mode not in ("w", "wb"):
            return tried(path, mode)
        object_ = _NewObject(as_given(path))
        return object_ if mode == "wb" else io.TextIOWrapper(object_, encoding="utf-8")

    return opened


class _NewObject(io.BytesIO):
    """A small object, written whole and at once when it is closed; safe to send twice."""

    def __init__(self, url: str):
        super().__init__()
        folder, _, self._name = url.rpartition("/")
        self._bucket = Bucket(folder)

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._bucket.write(self._name, data)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.close()
        else:
            super().close()  # what was begun is not written
