"""Files of a dataset: opened in a local folder, or copied from a URL to a cache of bounded size."""

import collections
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from microdit_jax.errors import UserError
from microdit_jax.files import atomic_path

_OLD_PARTIAL = 3600  # seconds; another process may still be writing a younger unfinished file
_ATTEMPTS = 3  # to fetch a file; the second and third after 1 and 2 seconds


class ShardFiles:
    """Files below a local folder or an fsspec URL (gs://, s3://, https://, memory://, ...).

    Each process needs a cache folder of its own, or the bound holds for each process by itself.
    Safe in threads.

    Attributes:
      root: the folder or URL, without a trailing slash.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        cache: str | os.PathLike | None = None,
        cache_bytes: int = 100 * 10**9,
        on_evict: Callable[[str], None] = lambda name: None,
    ):
        """
        Args:
          cache: folder for what is fetched or unpacked. A URL needs one. A local folder's
            compressed shards are unpacked there, or else beside themselves.
          cache_bytes: bound of the cache's size; the files opened longest ago are removed.
          on_evict: called with the name of each file that is removed.
        """
        self.root = str(root).rstrip("/").removeprefix("file://")
        self._filesystem: fsspec.AbstractFileSystem | None = None  # None: a local folder
        if "://" in self.root:
            if cache is None:
                raise UserError(
                    f"{self.root} is read through a cache on a local disk, found no folder for it; "
                    "give one (train_main.py --config.data.cache=/tmp/latents; python -m "
                    "microdit_jax.prepare.reformat --cache=/tmp/latents)"
                )
            try:
                self._filesystem, self._path = fsspec.core.url_to_fs(self.root)
            except (ImportError, ValueError) as error:
                raise UserError(f"{self.root} cannot be opened: {error}") from error
        key = hashlib.sha256(self.root.encode()).hexdigest()[:16]
        self._cache = None if cache is None else Path(cache) / key
        self._cache_bytes, self._on_evict = cache_bytes, on_evict
        self._lock = threading.Lock()
        self._file_locks: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
        self._kept: collections.OrderedDict[str, int] = collections.OrderedDict()
        if self._cache is not None:
            self._kept.update(_left_by_earlier_runs(self._cache))

    @property
    def is_local(self) -> bool:
        """True if files are read in their own folder, without a copy."""
        return self._filesystem is None

    def location(self, name: str) -> str:
        """Returns the path or URL of a file, for messages."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Returns True if the dataset has that file; asks the network for a URL."""
        if self._filesystem is None:
            return Path(self.root, name).is_file()
        return self._filesystem.isfile(f"{self._path}/{name}")

    def read(self, name: str) -> bytes:
        """Reads a small file, without the cache.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        try:
            if self._filesystem is None:
                return Path(self.root, name).read_bytes()
            return _bytes_of(self._filesystem, f"{self._path}/{name}")
        except Exception as error:  # filesystems of URLs have exceptions of their own
            raise UserError(
                f"expected the file {self.location(name)}, could not read it "
                f"({_reason(error)}); check the path"
            ) from error

    def open(self, name: str, size: int) -> BinaryIO:
        """Opens a file of `size` bytes for reading; one of a URL is fetched first.

        Raises:
          UserError: it is missing, cannot be fetched, or has another size.
        """
        filesystem = self._filesystem
        if filesystem is not None:
            return self.make(name, size, lambda: self._fetch(filesystem, name, size))
        path = Path(self.root, name)
        try:
            file = open(path, "rb")
        except OSError as error:
            raise UserError(
                f"expected the file {path} of {size} bytes, found none ({_reason(error)}); "
                "copy the dataset again"
            ) from error
        found = os.fstat(file.fileno()).st_size
        if found != size:
            file.close()
        _check_size(path, size, found)
        return file

    def make(self, name: str, size: int, content: Callable[[], bytes | bytearray]) -> BinaryIO:
        """Opens a file in the cache, or else in the dataset's folder, for reading; made once.

        Args:
          size: bytes expected; a file of another size is made anew.
          content: called for the bytes if the file is not there.
        """
        path = (Path(self.root) if self._cache is None else self._cache) / name
        with self._file_locks[name]:
            file = _open_sized(path, size)
            if file is None:
                file = _write_and_open(path, content())
        if self._cache is not None:
            self._keep(self._cache, name, size)
        return file

    def _fetch(self, filesystem: fsspec.AbstractFileSystem, name: str, size: int) -> bytes:
        data = b""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                data = _bytes_of(filesystem, f"{self._path}/{name}")
                break
            except Exception as error:  # filesystems have exceptions of their own
                missing = isinstance(error, FileNotFoundError)
                if attempt == _ATTEMPTS or missing:
                    raise UserError(
                        f"expected the file {self.location(name)}, could not fetch it "
                        f"({_reason(error)}); check the path and the network"
                    ) from error
                time.sleep(attempt)
        _check_size(self.location(name), size, len(data))
        return data

    def _keep(self, cache: Path, name: str, size: int) -> None:
        """Marks a file as just opened, and removes those opened longest ago beyond the bound."""
        gone = []
        with self._lock:
            self._kept[name] = size
            self._kept.move_to_end(name)
            while sum(self._kept.values()) > self._cache_bytes and len(self._kept) > 1:
                gone.append(self._kept.popitem(last=False)[0])
        for old in gone:
            self._on_evict(old)
            (cache / old).unlink(missing_ok=True)  # readers that have it open can go on


def _left_by_earlier_runs(cache: Path) -> Iterator[tuple[str, int]]:
    """Yields names and sizes of a cache's files, oldest first; removes what a kill left."""
    found = []
    for path in filter(Path.is_file, cache.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # other processes move and remove files
            state = path.stat()
            if not path.name.endswith(".partial"):
                found.append((state.st_mtime, path.relative_to(cache).as_posix(), state.st_size))
            elif time.time() - state.st_mtime > _OLD_PARTIAL:
                path.unlink()
    for _, name, size in sorted(found):
        yield name, size


def _bytes_of(filesystem: fsspec.AbstractFileSystem, path: str) -> bytes:
    return cast(bytes, filesystem.cat_file(path))  # str is for filesystems opened as text


def _open_sized(path: Path, size: int) -> BinaryIO | None:
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size == size:
        return file
    file.close()
    return None


def _write_and_open(path: Path, data: bytes | bytearray) -> BinaryIO:
    """Writes a file whole or not at all, and opens it before another process could remove it."""
    with atomic_path(path, len(data)) as partial:
        partial.write_bytes(data)
        return open(partial, "rb")


def _check_size(where: str | Path, expected: int, found: int) -> None:
    if expected != found:
        raise UserError(
            f"expected {expected} bytes in {where}, found {found}; the file was cut off or "
            "replaced: copy it again"
        )


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or f"{type(error).__name__}: {error}".removesuffix(": ")
