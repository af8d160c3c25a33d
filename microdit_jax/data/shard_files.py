"""Files of a dataset: opened in a local folder, or copied from a URL to a cache of bounded size."""

import collections
import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from microdit_jax.data.mapped import map_file
from microdit_jax.errors import UserError, visible
from microdit_jax.files import HeldFolder, open_regular, read_bytes
from microdit_jax.files.attempts import SLOW_SECONDS_OF_FILES, BucketError, attempt
from microdit_jax.files.bucket import FIRST_SECONDS, SCHEMES, Bucket, filesystem
from microdit_jax.files.reading import MAX_TEXT
from microdit_jax.files.urls import scheme_of

# Looks at a file's bytes, and whether an earlier run made it; raises UserError if they are wrong
Check = Callable[[memoryview, bool], None]

_OLD_PARTIAL = 3600  # seconds; another process may still be writing a younger unfinished file


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
          cache: folder for what is fetched or unpacked. Without one a URL's files cannot be opened,
            and a local folder's compressed shards are unpacked beside themselves.
          cache_bytes: bound of the cache's size; the files opened longest ago are removed.
          on_evict: called with the name of each file that is removed.
        """
        self.root = str(root).rstrip("/").removeprefix("file://")
        self._filesystem: fsspec.AbstractFileSystem | None = None  # None: a local folder
        if "://" in self.root:
            self._filesystem = filesystem(scheme_of(self.root))
            self._path = str(self._filesystem._strip_protocol(self.root))
        self._cache: HeldFolder | None = None
        if cache is not None:  # a user's own, as others may share the folder above it
            key = hashlib.sha256(self.root.encode()).hexdigest()[:16]
            self._cache = HeldFolder(Path(cache) / f"{key}-{os.getuid()}", own=True)
        self._cache_bytes, self._on_evict = cache_bytes, on_evict
        self._lock = threading.Lock()
        self._file_locks: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
        self._mine: set[str] = set()  # files that this reader made, or has checked
        self._kept: collections.OrderedDict[str, int] = collections.OrderedDict()
        if self._cache is not None:
            self._kept.update(_left_by_earlier_runs(self._cache))

    @property
    def is_local(self) -> bool:
        """True if files are read in their own folder, without a copy."""
        return self._filesystem is None

    @property
    def room(self) -> int:
        """Size in bytes that the cache may grow to by its disk; 0 where there is no cache."""
        if self._cache is None:
            return 0
        return sum(self._kept.values()) + shutil.disk_usage(self._cache.path).free

    def check_cache(self) -> None:
        """Raises UserError for a URL without a cache."""
        if self._filesystem is not None and self._cache is None:
            raise UserError(
                f"{self.root} is read through a cache on a local disk, found no folder for it; "
                "give one (train_main.py --config.data.cache=/tmp/latents; python -m "
                "microdit_jax.prepare.reformat --cache=/tmp/latents)"
            )

    def check_bucket(self) -> None:
        """Raises BucketError for a URL in a bucket that is not there."""
        if scheme_of(self.root) in SCHEMES:
            Bucket(self.root, seconds=FIRST_SECONDS).check_bucket()

    def location(self, name: str) -> str:
        """Returns the path or URL of a file, for messages."""
        return f"{visible(self.root)}/{visible(name)}"

    def exists(self, name: str) -> bool:
        """Returns True if the dataset has that file; asks the network for a URL."""
        if self._filesystem is None:
            return Path(self.root, name).is_file()
        filesystem = self._filesystem
        try:
            found = attempt(
                self.location(name),
                lambda: filesystem.info(f"{self._path}/{name}"),
                seconds=FIRST_SECONDS,
            )
        except BucketError as error:
            if error.kind != "missing":
                raise
            return False
        return found.get("type") != "directory"

    def read(self, name: str) -> bytes:
        """Reads a small file, without the cache.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        try:
            if self._filesystem is None:
                return read_bytes(self._local(name))
            filesystem = self._filesystem
            data = attempt(
                self.location(name),
                lambda: _bytes_of(filesystem, f"{self._path}/{name}", MAX_TEXT),
                seconds=FIRST_SECONDS,
            )
            if len(data) > MAX_TEXT:
                raise UserError(
                    f"expected at most {MAX_TEXT} bytes in {self.location(name)}, found more; "
                    "check the path"
                )
            return data
        except UserError:
            raise
        except Exception as error:  # filesystems of URLs have exceptions of their own
            raise UserError(
                f"expected the file {self.location(name)}, could not read it "
                f"({_reason(error)}); check the path"
            ) from error

    def open(self, name: str, size: int, check: Check = lambda data, kept: None) -> BinaryIO:
        """Opens a file of `size` bytes for reading; one of a URL is fetched first.

        Args:
          check: called for the file's bytes; as `make` takes it where the file is fetched.
        Raises:
          UserError: it is missing, cannot be fetched, has another size, or leads out of the folder.
        """
        filesystem = self._filesystem
        if filesystem is not None:
            return self.make(name, size, lambda: self._fetch(filesystem, name, size), check)
        where = self.location(name)
        try:
            file = open_regular(self._local(name))
        except OSError as error:
            raise UserError(
                f"expected the file {where} of {size} bytes, found none ({_reason(error)}); "
                "copy the dataset again"
            ) from error
        try:
            _check_size(where, size, os.fstat(file.fileno()).st_size)
            if size:
                check(map_file(file), False)
        except BaseException:
            file.close()
            raise
        return file

    def check_uncut(self, name: str, size: int) -> None:
        """Raises UserError if a mapped file of a local dataset was cut since it was opened.

        The kernel ends a process that reads a map beyond the end of its file (SIGBUS). One that was
        removed or replaced stays whole below its map. The cache's files are this process's own.
        """
        if self._filesystem is not None:
            return
        try:
            found = os.stat(f"{self.root}/{name}").st_size
        except OSError:
            return
        if found < size:
            _check_size(self.location(name), size, found)

    def make(
        self,
        name: str,
        size: int,
        content: Callable[[], bytes | memoryview],
        check: Check = lambda data, kept: None,
    ) -> BinaryIO:
        """Opens a file in the cache, or else in the dataset's folder, for reading; made once.

        Args:
          size: bytes expected; a file of another size is made anew.
          content: called for the bytes if the file is not there.
          check: called before new bytes take their name; and for a file that an earlier run left
            in the cache, which is made anew if it raises UserError.
        """
        self.check_cache()
        folder = HeldFolder(self.root) if self._cache is None else self._cache
        with self._file_locks[name]:
            file = self._kept_file(folder, name, size, check)
            if file is None:
                data = memoryview(content())
                file = folder.make(name, data, lambda: check(data, False))
            self._mine.add(name)
        if self._cache is not None:
            self._keep(self._cache, name, size)
        return file

    def _kept_file(self, folder: HeldFolder, name: str, size: int, check: Check) -> BinaryIO | None:
        """Opens a file that is there already; None if it is not, or not what it must be."""
        file = folder.open(name)
        if file is None:
            return None
        if os.fstat(file.fileno()).st_size == size:
            if name in self._mine or not size:
                return file
            with contextlib.suppress(UserError):
                check(map_file(file), True)
                return file
        file.close()
        return None

    def _local(self, name: str) -> Path:
        """Returns the path of a file of a local dataset, which no link may lead out of.

        But into the folder where huggingface_hub keeps the contents of its snapshots.
        """
        path, root = os.path.realpath(Path(self.root, name)), os.path.realpath(self.root)
        allowed = [root]
        for folder in (Path(root), *Path(root).parents):
            if folder.parent.name == "snapshots":
                allowed.append(os.path.join(folder.parent.parent, "blobs"))
        if not any(path.startswith(os.path.join(place, "")) for place in allowed):
            raise UserError(
                f"expected {self.location(name)} inside its dataset, found a link that leads out; "
                "copy what it leads to"
            )
        return Path(path)

    def _fetch(self, filesystem: fsspec.AbstractFileSystem, name: str, size: int) -> bytes:
        where = self.location(name)
        try:
            data = attempt(
                where,
                lambda: _bytes_of(filesystem, f"{self._path}/{name}", size),
                slow_seconds=SLOW_SECONDS_OF_FILES,
            )
        except BucketError as error:
            raise UserError(
                f"expected the file {where}, could not fetch it ({error}); check the path and the "
                "network"
            ) from error
        _check_size(self.location(name), size, len(data))
        return data

    def _keep(self, cache: HeldFolder, name: str, size: int) -> None:
        """Marks a file as just opened, and removes those opened longest ago beyond the bound."""
        gone = []
        with self._lock:
            self._kept[name] = size
            self._kept.move_to_end(name)
            while sum(self._kept.values()) > self._cache_bytes and len(self._kept) > 1:
                gone.append(self._kept.popitem(last=False)[0])
        for old in gone:
            self._on_evict(old)
            cache.remove(old)  # readers that have it open can go on


def _left_by_earlier_runs(cache: HeldFolder) -> Iterator[tuple[str, int]]:
    """Yields names and sizes of a cache's files, oldest first; removes what a kill left."""
    found = []
    for name, state in cache.files():
        if not name.endswith(".partial"):
            found.append((state.st_mtime, name, state.st_size))
        elif time.time() - state.st_mtime > _OLD_PARTIAL:
            cache.remove(name)
    for _, name, size in sorted(found):
        yield name, size


def _bytes_of(filesystem: fsspec.AbstractFileSystem, path: str, most: int) -> bytes:
    """Reads a file of `most` bytes; of a larger one it asks for a single byte more."""
    return cast(bytes, filesystem.cat_file(path, start=0, end=most + 1))  # str is of text alone


def _check_size(where: str, expected: int, found: int) -> None:
    if expected != found:
        raise UserError(
            f"expected {expected} bytes in {where}, found {found}; the file was cut off or "
            "replaced: copy it again"
        )


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or f"{type(error).__name__}: {error}".removesuffix(": ")
