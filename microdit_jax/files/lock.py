"""One small file that says who is at work in a folder, for hosts that share nothing but its disk.

Locks of the system (flock) do not reach from host to host on many shared disks, and no bucket has
them. What all have is a file that is made only if there is none; where a bucket replaces an object
only if its generation is still the same, a disk lets one process at a time follow an older claim.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from microdit_jax.files.attempts import BucketError
from microdit_jax.files.bucket import Bucket
from microdit_jax.files.urls import scheme_of

NAME = ".lock"
MOST_BYTES = 4096
_BUCKET_SECONDS = 20.0  # to try a call for; the next sign of life is another try
TURN_SECONDS = 60.0  # after which one that died while it took a claim over makes room


class Held(NamedTuple):
    """A lock's file as it was read.

    Attributes:
      text: what its owner wrote, at most 4,096 bytes; "" while that is on its way.
      version: another one after each change and each sign of life; a bucket's generation.
      age: seconds since the last sign of life, by the clock of the disk or bucket.
    """

    text: str
    version: str
    age: float


@runtime_checkable
class LockFile(Protocol):
    """A folder's lock. Every method raises OSError where the disk or bucket fails."""

    def read(self) -> Held | None:
        """Returns the file as it is now, not as a cache has it; None if there is none."""
        ...

    def create(self, text: str) -> bool:
        """Makes the file, and the folder; returns False if there is a file already."""
        ...

    def replace(self, held: Held, text: str) -> bool:
        """Writes another text if the file is still of this version; returns False if it is not."""
        ...

    def renew(self, held: Held) -> None:
        """Gives a sign of life, if the file is still of this version."""
        ...

    def remove(self, held: Held) -> None:
        """Removes the file if it is still of this version, and a folder that it alone made."""
        ...


def lock_of(folder: str | os.PathLike) -> LockFile:
    """Returns the lock of a folder, of the kind that its disk or bucket can keep."""
    return BucketLock(folder) if scheme_of(folder) == "gs" else DiskLock(Path(folder))


class DiskLock:
    """The lock of a folder on a disk, which may be shared by hosts and know no flock."""

    def __init__(self, folder: Path):
        self._folder, self._path, self._made = folder, folder / NAME, False

    def read(self) -> Held | None:
        """Returns the file as the disk has it; None if there is none."""
        found = self._look()
        return found and found._replace(age=max(0.0, self._now() - found.age))

    def create(self, text: str) -> bool:
        """Makes the file, and the folder; returns False if there is a file already."""
        if not self._folder.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._made = True
        return _create(self._path, text)

    def replace(self, held: Held, text: str) -> bool:
        """Writes another text if the file is still of this version; returns False if it is not."""
        # Named after what it follows: of all that want to follow that, one can make this file, and
        # whoever comes when it is gone again finds another text in the lock.
        turn = self._beside(f"after.{hashlib.sha256(held.text.encode()).hexdigest()[:16]}")
        if not _create(turn, ""):
            with contextlib.suppress(FileNotFoundError):
                if self._now() - turn.stat().st_mtime > TURN_SECONDS:
                    turn.unlink(missing_ok=True)
            return False
        partial = self._beside(f"{secrets.token_hex(8)}.partial")
        try:
            if not self._is_still(held):
                return False
            partial.write_text(text)
            os.replace(partial, self._path)
            return True
        finally:
            partial.unlink(missing_ok=True)
            turn.unlink(missing_ok=True)

    def renew(self, held: Held) -> None:
        """Gives a sign of life, if the file is still of this version."""
        if self._is_still(held):
            os.utime(self._path)

    def remove(self, held: Held) -> None:
        """Removes the file if it is still of this version, and a folder that it alone made."""
        if self._is_still(held):
            self._path.unlink(missing_ok=True)
            if self._made:
                with contextlib.suppress(OSError):  # others' files are there
                    self._folder.rmdir()

    def _look(self) -> Held | None:
        """Returns the file with the time of its last change in place of its age."""
        try:
            # NFS asks its server about a file again when it is opened.
            with open(self._path, "rb") as file:
                text, about = file.read(MOST_BYTES), os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        version = f"{about.st_ino} {about.st_mtime_ns}"
        return Held(text.decode(errors="replace"), version, about.st_mtime)

    def _is_still(self, held: Held) -> bool:
        now = self._look()
        return now is not None and now[:2] == held[:2]

    def _now(self) -> float:
        """Returns the disk's time, which is not this host's."""
        probe = self._beside(f"{secrets.token_hex(8)}.partial")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:  # full, or read-only by now
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def _beside(self, end: str) -> Path:
        return self._path.with_name(f"{NAME}.{end}")


class BucketLock:
    """The lock of a folder of a bucket, which writes an object only over a certain generation."""

    def __init__(self, folder: str | os.PathLike):
        self._bucket = Bucket(folder, seconds=_BUCKET_SECONDS)
        self._ahead: float | None = None  # seconds that the store's clock is ahead of this host's

    def read(self) -> Held | None:
        """Returns the object as it is now; None if there is none."""
        with _as_os_errors():
            if (found := self._bucket.generation(NAME)) is None:
                return None
            version, changed = found
            try:
                text = self._bucket.read(NAME, MOST_BYTES).decode(errors="replace")
            except BucketError as error:
                if error.kind != "missing":
                    raise
                return None  # just removed
            return Held(text, version, max(0.0, time.time() + self._clock() - changed))

    def create(self, text: str) -> bool:
        """Makes the object; returns False if there is one already."""
        with _as_os_errors():
            return self._bucket.write_over(NAME, text.encode(), "0")

    def replace(self, held: Held, text: str) -> bool:
        """Writes another text if the object is still of this version; False if it is not."""
        with _as_os_errors():
            return self._bucket.write_over(NAME, text.encode(), held.version)

    def renew(self, held: Held) -> None:
        """Gives a sign of life, if the object is still of this version."""
        self.replace(held, held.text)

    def remove(self, held: Held) -> None:
        """Removes the object if it is still of this version."""
        with _as_os_errors():
            found = self._bucket.generation(NAME)
            if found is not None and found[0] == held.version:
                self._bucket.remove([NAME])

    def _clock(self) -> float:
        if self._ahead is None:
            probe = f"{NAME}.{secrets.token_hex(8)}.partial"
            self._bucket.write(probe, b"")
            found = self._bucket.generation(probe)
            self._ahead = found[1] - time.time() if found else 0.0
            self._bucket.remove([probe])
        return self._ahead


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except BucketError as error:
        raise OSError(errno.EIO, str(error)) from error


def _create(path: Path, text: str) -> bool:
    """Makes a file that is not there; returns False if it is."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(number, "w") as file:
            file.write(text)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True
