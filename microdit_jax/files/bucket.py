"""Folders of object stores (gs://, s3://, memory://) by fsspec: whole objects in and out.

An object appears whole or not at all, so nothing here needs a temporary name. There is no rename:
a folder of several objects counts once the one that is written last is there.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import posixpath
import secrets
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from microdit_jax.errors import UserError, visible
from microdit_jax.files.attempts import SLOW_SECONDS, SLOW_SECONDS_OF_FILES, BucketError, attempt
from microdit_jax.files.reading import MAX_TEXT
from microdit_jax.files.urls import as_given, scheme_of

if TYPE_CHECKING:  # loading it takes a tenth of a second, and --help should not
    import fsspec

SCHEMES = ("gs", "s3", "memory")
FIRST_SECONDS = 60.0  # to try a first look for: nothing is lost yet if it fails
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_PIECE = 1 << 24  # bytes of a large object that are held at a time
_AT_ONCE = 16  # objects on their way at a time
# gcsfs asks about hierarchical and zonal buckets first, for which a person needs further rights.
_LOGGERS = ("gcsfs", "s3fs", "aiobotocore", "botocore")
_SETTINGS = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


class Object(NamedTuple):
    """An object of a bucket.

    Attributes:
      size: in bytes.
      version: another one for other contents: the store's checksum, or else its own number.
    """

    size: int
    version: str


class Bucket:
    """A folder of a bucket; names are relative to it, with "/" between folders. Safe in threads.

    All methods try again for minutes where that may help (`attempts`), and raise BucketError.

    Attributes:
      url: without a trailing slash.
    """

    def __init__(self, url: str | os.PathLike, *, seconds: float | None = None):
        """
        Args:
          seconds: to try each call again for; None: attempts.SECONDS.
        """
        self.url = as_given(url).rstrip("/")
        self._seconds = seconds
        self._files = filesystem(scheme_of(url))
        self._path = str(self._files._strip_protocol(self.url))

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(f"{self.url}/{name}", seconds=self._seconds)

    def read(self, name: str, most: int = MAX_TEXT) -> bytes:
        """Reads an object whole.

        Raises:
          UserError: it has more than `most` bytes.
        """
        data = self._try(name, lambda path: self._files.cat_file(path, start=0, end=most + 1))
        if len(data) > most:
            raise UserError(f"expected at most {most:,} bytes in {self._shown(name)}, found more")
        return bytes(data)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Reads the bytes from `start` up to `end`, which is not among them."""
        return bytes(self._try(name, lambda path: self._files.cat_file(path, start=start, end=end)))

    def write(self, name: str, data: bytes) -> None:
        """Writes an object, whole or not at all."""
        with self._bucket_if_missing(name):
            self._try(name, lambda path: self._files.pipe_file(path, data))

    def write_json(self, name: str, contents: Mapping[str, Any]) -> None:
        """Writes indented JSON, whole or not at all."""
        text = json.dumps(contents, indent=1, ensure_ascii=False) + "\n"
        self.write(name, text.encode())

    def checksum(self, name: str) -> tuple[int, str]:
        """Returns an object's size in bytes and its sha256, which is read in pieces."""
        digest, size = hashlib.sha256(), 0
        while piece := self.read_range(name, size, size + _PIECE):
            digest.update(piece)
            size += len(piece)
            if len(piece) < _PIECE:
                break
        return size, digest.hexdigest()

    def upload(self, local: Path, name: str) -> None:
        """Copies a local file to an object; a large one in parts, of which only a failed one is
        sent again."""
        with self._bucket_if_missing(name):
            self._try(
                name,
                lambda path: self._files.put_file(str(local), path),
                slow_seconds=SLOW_SECONDS_OF_FILES,
            )

    def download(self, name: str, local: Path) -> None:
        """Copies an object to a local file, which takes its name when it is complete."""
        partial = local.with_name(f".{local.name}.{secrets.token_hex(4)}.partial")
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._try(
                name,
                lambda path: self._files.get_file(path, str(partial)),
                slow_seconds=SLOW_SECONDS_OF_FILES,
            )
            partial.replace(local)
        finally:
            partial.unlink(missing_ok=True)

    def stat(self, name: str) -> Object | None:
        """Returns an object's size and version; None if there is none."""
        with _none_if_missing():
            about = self._try(name, self._files.info)
            return None if about.get("type") == "directory" else _object(about)
        return None

    def objects(self, below: str = "") -> dict[str, Object]:
        """Returns all objects below a folder of this one, by name; {} if there are none."""
        prefix = f"{self._path}/{below}".rstrip("/")
        with _none_if_missing():
            found = self._try(below, lambda path: self._files.find(prefix, detail=True))
            return {
                path.lstrip("/").removeprefix(f"{self._path.lstrip('/')}/"): _object(about)
                for path, about in sorted(found.items())
                if not path.endswith("/")  # what some tools make in place of a folder
            }
        return {}

    def entries(self, below: str = "") -> list[str]:
        """Returns the names directly in a folder, of objects and folders alike, sorted."""
        prefix = f"{self._path}/{below}".rstrip("/")
        with _none_if_missing():
            found = self._try(below, lambda path: self._files.ls(prefix, detail=False))
            names = {posixpath.basename(path.rstrip("/")) for path in found}
            return sorted(names - {"", posixpath.basename(prefix)})
        return []

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are passed over."""

        def gone(name: str) -> None:
            with _none_if_missing():
                self._try(name, self._files.rm_file)

        self.each(gone, names)

    def generation(self, name: str) -> tuple[str, float] | None:
        """Returns an object's generation and when it was written, by the store's clock; gs alone.

        None if there is no such object.
        """
        with _none_if_missing():
            about: Any = self._try(name, self._files.info)
            return str(about["generation"]), about["mtime"].timestamp()
        return None

    def write_over(self, name: str, data: bytes, generation: str) -> bool:
        """Writes an object if it still is of this generation, "0" for not there; gs alone.

        Returns:
          False if it is of another one.
        """
        folder, _, key = f"{self._path}/{name}".partition("/")
        files: Any = self._files

        def call(path: str) -> None:
            files.call(
                "POST",
                f"{files._location}/upload/storage/v1/b/{folder}/o",
                uploadType="media",
                name=key,
                ifGenerationMatch=generation,
                data=data,
                headers={"Content-Type": "application/octet-stream"},
            )

        try:
            self._try(name, call)
        except BucketError as error:
            if error.kind != "taken":
                raise
            return False
        return True

    def each(self, work: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
        """Calls for each name, many at a time, and returns the results in order."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(work, names))

    def check_writable(self) -> None:
        """Writes an object and removes it again: call it before the work."""
        name = f".{secrets.token_hex(4)}.partial"
        self.write(name, b"")
        self.remove([name])

    def check_bucket(self) -> None:
        """Raises BucketError if the store says that there is no such bucket, whatever it has."""
        if scheme_of(self.url) != "gs":  # S3's other answers say it too
            return
        files: Any = self._files
        top = self._path.strip("/").partition("/")[0]
        try:
            with self._bucket_if_missing(""):
                self._try("", lambda path: files.call("GET", f"b/{top}", json_out=True))
        except BucketError as error:
            if error.kind == "no bucket":  # others may lack the right to ask
                raise

    @contextlib.contextmanager
    def _bucket_if_missing(self, name: str):
        """Turns "no such object" into "no such bucket", where nothing else can be missing."""
        try:
            yield
        except BucketError as error:
            if error.kind != "missing":
                raise
            raise BucketError(
                f"could not use {self._shown(name)}: there is no such bucket; check its name",
                "no bucket",
            ) from error

    def _try(
        self, name: str, call: Callable[[str], Any], *, slow_seconds: float = SLOW_SECONDS
    ) -> Any:
        path = f"{self._path}/{name}" if name else self._path
        return attempt(
            self._shown(name),
            lambda: call(path),
            seconds=self._seconds,
            slow_seconds=slow_seconds,
        )

    def _shown(self, name: str) -> str:
        return visible(f"{self.url}/{name}" if name else self.url)


def filesystem(scheme: str) -> "fsspec.AbstractFileSystem":
    """Returns fsspec's filesystem for URLs of a scheme.

    Raises:
      UserError: no such scheme, or its package is not installed.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in _LOGGERS:  # pages about what `attempts` says in a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return _filesystem(scheme, os.getpid())


@functools.cache
def _filesystem(scheme: str, process: int) -> "fsspec.AbstractFileSystem":
    import fsspec

    # Of each process its own: their event loops do not survive a fork.
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        if scheme in _PACKAGES:
            package, extra = _PACKAGES[scheme]
            raise UserError(
                f"{scheme}:// needs the package {package}, found none; pip install "
                f"'microdit_jax[{extra}]'"
            ) from error
        raise UserError(
            f"expected a URL of {', '.join(SCHEMES)}, found {visible(scheme)}://; copy it to one"
        ) from error


def _object(about: dict[str, Any]) -> Object:
    keys = ("crc32c", "md5Hash", "ETag", "etag", "generation", "created", "mtime")
    version = next((f"{key}:{about[key]}" for key in keys if about.get(key)), "")
    return Object(int(about["size"]), version)


@contextlib.contextmanager
def _none_if_missing():
    try:
        yield
    except BucketError as error:
        if error.kind != "missing":
            raise
