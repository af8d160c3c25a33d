"""Parts of a job are claimed one at a time, by whoever is free, on a folder that all hosts share.

The folder is on a shared disk, or in a bucket of gs:// (bucket_parts). A claim is a lock
(files.lock) in OUTPUT/.claims/PART with a sign of life. It is taken over if its process is gone
from this host, or gave no sign for a minute: a lost host's parts are done by the others. Claims
only save work: a part's bytes are the same whoever writes it, so a host that was only slow, and
comes back to a part that another has done, does no harm.
"""

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from microdit_jax.errors import UserError
from microdit_jax.files import disk_errors
from microdit_jax.files.lock import LockFile, lock_of
from microdit_jax.machine.claim import is_gone, owner_of, owner_text
from microdit_jax.prepare.bucket_parts import BucketParts

FOLDER = ".claims"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


class Claims:
    """Parts of a job that are left, and this process's claims on them, as a context manager.

    Args:
      output: the folder of the job.
      names: what each part is called there once it is done.
      process_index, process_count: this process begins with every process_count-th part, so that
        several seldom want the same one.
      bucket: the parts in a bucket, where the output is a local folder in its place.
    """

    def __init__(
        self,
        output: Path,
        names: Sequence[str],
        *,
        process_index: int = 0,
        process_count: int = 1,
        bucket: BucketParts | None = None,
    ):
        self._output, self._names, self._bucket = output, names, bucket
        firsts = [(process_index + turn) % process_count for turn in range(process_count)]
        self._left = [n for first in firsts for n in range(first, len(names), process_count)]
        self._text = owner_text(secrets.token_hex(8))
        self._held: dict[int, LockFile] = {}
        self._closing, self._changing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def available(self) -> Iterator[int]:
        """Yields the parts that nobody has done or works on, each claimed for this process."""
        self._drop_done()
        for number in list(self._left):
            # Again, as it may be long since the list was made.
            if number in self._held or self._is_done(number) or not self._take(number):
                continue
            if self._is_done(number):  # just before it was claimed
                self.release(number)
            else:
                yield number

    def left(self) -> int:
        """Returns how many parts are not done, those that others work on among them."""
        self._drop_done()
        return len(self._left)

    def claim_of(self, number: int) -> tuple[Path, str]:
        """Returns the folder of a claim that this process holds, and the text in its lock."""
        return self._output / FOLDER / self._names[number], self._text

    def release(self, number: int) -> None:
        """Gives a part's claim back, done or not."""
        if self._bucket is not None:
            self._bucket.send()  # before others look whether it is done
        with self._changing:
            lock = self._held.pop(number)
            with contextlib.suppress(OSError):  # it will be stale in a minute
                held = lock.read()
                if held is not None and held.text == self._text:
                    lock.remove(held)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._thread.join(BEAT_SECONDS)
        for number in list(self._held):
            self.release(number)

    def _drop_done(self) -> None:
        with disk_errors(self._output):
            done = {path.name for path in self._output.iterdir()}
        if self._bucket is not None:
            done |= self._bucket.done(self._names[number] for number in self._left)
        self._left = [number for number in self._left if self._names[number] not in done]

    def _is_done(self, number: int) -> bool:
        name = self._names[number]
        there = self._bucket is not None and self._bucket.is_done(name)
        return there or (self._output / name).exists()

    def _take(self, number: int) -> bool:
        folder = self._output / FOLDER / self._names[number]
        lock = lock_of(folder)
        if self._bucket is not None:
            lock = self._bucket.lock_of(f"{FOLDER}/{self._names[number]}")
        try:
            with disk_errors(folder), self._changing:
                taken = lock.create(self._text)
                if not taken and (held := lock.read()) is not None:
                    stale = is_gone(owner_of(held)) or held.age > STALE_SECONDS
                    taken = stale and lock.replace(held, self._text)
                if taken:
                    self._held[number] = lock
        except UserError:
            if not self._is_done(number):  # else whoever ended the job has removed all claims
                raise
            taken = False
        return taken

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            for number in list(self._held):
                with self._changing, contextlib.suppress(OSError):
                    lock = self._held.get(number)
                    held = None if lock is None else lock.read()
                    if lock is not None and held is not None and held.text == self._text:
                        lock.renew(held)


def others_at_work(output: Path) -> bool:
    """Returns True if any process holds a claim, or left one."""
    return any((output / FOLDER).glob("*/*"))


def wait_a_moment() -> None:
    """Waits before one looks again whether others have done their parts."""
    time.sleep(1.0)


def remove_leftovers(output: Path, bucket: BucketParts | None = None) -> None:
    """Removes what killed processes have left, once all parts are done."""
    if bucket is not None:
        bucket.remove(FOLDER)
    shutil.rmtree(output / FOLDER, ignore_errors=True)
    for path in output.glob(".[0-9]*.partial"):
        shutil.rmtree(path, ignore_errors=True)
