"""Outputs on a bucket: written to a local folder, and copied to the bucket file by file.

No bucket can append to an object, so a file that grows (metrics.jsonl, TensorBoard's) is sent whole
from time to time. A machine that dies loses what was written since then: at most half a minute, and
nothing from before the last `flush`.
"""

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from microdit_jax.errors import UserError, visible
from microdit_jax.files.attempts import say
from microdit_jax.files.bucket import Bucket
from microdit_jax.files.places import cache_folder
from microdit_jax.files.urls import as_given, scheme_of, show_as
from microdit_jax.files.writing import check_writable, disk_errors

PUSH_SECONDS = 30.0
# A file that grows is sent again when this much time has passed for each of its megabytes too.
_SECONDS_PER_MB = 2.0


class OutputFolder:
    """A folder that a command writes its files into.

    Attributes:
      path: the local folder to write to.
      name: the path or URL as it was given, for messages.
    """

    def __init__(self, path: str | os.PathLike):
        self.name, self.path = os.fspath(path), Path(path)

    def flush(self) -> None:
        """Returns when all files that were written are where they belong."""

    def forget(self, name: str) -> None:
        """Removes what was fetched of a folder, but not from where it came."""


class Spool(OutputFolder):
    """A local folder in place of a bucket's; `flush` sends what changed since, `close` the rest."""

    def __init__(
        self,
        url: str | os.PathLike,
        fetch: Callable[[str], bool],
        *,
        push: bool = True,
        drop: Callable[[str], bool] = lambda name: False,
    ):
        """
        Args:
          fetch: says which top-level names of the bucket's folder are fetched first.
          drop: says which files are removed here once they are sent, and are not fetched.
          push: if false, nothing is sent, as by processes that have a part in another's output.
        Raises:
          UserError: the bucket cannot be read or written.
        """
        self.name, self._push, self._drop = as_given(url).rstrip("/"), push, drop
        self._bucket = Bucket(url)
        if push:
            check_writable(self.name, folder=True)
        key = hashlib.sha256(self.name.encode()).hexdigest()[:16]
        home = cache_folder() / "spool"
        _remove_left(home, key)
        self._home = home / f"{key}-{os.getpid()}"
        self.path = self._home / self.name.rpartition("/")[2]  # its name is shown in reports
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        show_as(self.path, self.name)
        self._sent: dict[str, tuple[int, int]] = {}
        self._times: dict[str, float] = {}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._fetch(fetch)
        self._thread = threading.Thread(target=self._push_now_and_then, name="spool", daemon=True)
        if push:
            self._thread.start()

    def flush(self) -> None:
        """Sends all files that changed, and removes from the bucket what was removed here.

        Raises:
          UserError: the bucket cannot be written.
        """
        if self._push:
            self._send(lambda name, about: True)

    def forget(self, name: str) -> None:
        """Removes what was fetched of a folder, but not from the bucket."""
        with self._lock:
            for sent in [sent for sent in self._sent if sent.startswith(f"{name}/")]:
                del self._sent[sent]
            shutil.rmtree(self.path / name, ignore_errors=True)

    def close(self, *, failed: bool = False) -> None:
        """Sends the rest and removes the local folder; keeps it if that fails.

        Args:
          failed: an error is on its way already; one more is only told.
        """
        self._closing.set()
        try:
            self.flush()
        except UserError as error:
            message = f"{error}; the files lie in {os.path.realpath(self.path)}"
            show_as(self.path, None)
            if not failed:
                raise UserError(message) from error
            say(message)
            return
        show_as(self.path, None)
        shutil.rmtree(self._home, ignore_errors=True)

    def _fetch(self, wanted: Callable[[str], bool]) -> None:
        names = []
        for top in filter(wanted, self._bucket.entries()):
            below = self._bucket.objects(top)
            names += list(below) if below else [top]
        names = [name for name in names if _is_own(name) and not self._drop(name)]
        self._bucket.each(lambda name: self._bucket.download(name, self.path / name), names)
        self._sent = dict(self._files())

    def _push_now_and_then(self) -> None:
        while not self._closing.wait(PUSH_SECONDS):
            with contextlib.suppress(UserError):  # told by `attempt`; the next time, or at the end
                self._send(self._is_due)

    def _is_due(self, name: str, about: tuple[int, int]) -> bool:
        last = self._times.get(name, 0.0)
        return about[1] / 1e9 - last >= _SECONDS_PER_MB * about[0] / 2**20

    def _send(self, due: Callable[[str, tuple[int, int]], bool]) -> None:
        with self._lock:
            files = self._files()
            changed = [n for n, a in files.items() if self._sent.get(n) != a]
            later = [n for n in changed if not due(n, files[n])]
            # What makes a folder count comes last, and not before all that lies in it.
            early = {n for n in changed if _comes_last(n) and _lies_beside(n, later)}
            changed = [n for n in changed if n not in early and n not in later]
            self._bucket.each(self._upload, [n for n in changed if not _comes_last(n)])
            self._bucket.each(self._upload, list(filter(_comes_last, changed)))
            for name in changed:
                self._sent[name], self._times[name] = files[name], files[name][1] / 1e9
            gone = [name for name in self._sent if name not in files]
            self._bucket.remove(gone)
            for name in gone:
                del self._sent[name]
            for name in filter(self._drop, changed):
                del self._sent[name]
                (self.path / name).unlink(missing_ok=True)

    def _upload(self, name: str) -> None:
        # A file that was replaced or removed meanwhile is found changed the next time.
        with contextlib.suppress(FileNotFoundError):
            self._bucket.upload(self.path / name, name)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Returns size and time of the last change (ns) of each file, by name."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                if path.is_file() and _is_own(name):
                    found[name] = about.st_size, about.st_mtime_ns
        return found


@contextlib.contextmanager
def output_folder(
    path: str | os.PathLike,
    *,
    fetch: Callable[[str], bool] = lambda name: True,
    push: bool = True,
    drop: Callable[[str], bool] = lambda name: False,
) -> Iterator[OutputFolder]:
    """Gives the folder to write an output to: a local one itself, a spool for a bucket's.

    Args:
      fetch, push, drop: as `Spool` takes them.
    Raises:
      UserError: it cannot be written; at the end, that the bucket did not take the files.
    """
    if not scheme_of(path):
        yield OutputFolder(path)
        return
    spool = Spool(path, fetch, push=push, drop=drop)
    try:
        yield spool
    except BaseException:
        spool.close(failed=True)
        raise
    spool.close()


@contextlib.contextmanager
def output_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a local path to write an output's file at; one of a bucket is sent when it is there.

    Raises:
      UserError: it cannot be written.
    """
    if not scheme_of(path):
        yield Path(path)
        return
    folder, _, name = as_given(path).rpartition("/")
    with output_folder(folder, fetch=lambda found: found == name) as spool:
        yield spool.path / name


def _is_own(name: str) -> bool:
    """Returns True for a file that belongs to the output: not unfinished, not a lock, not W&B's."""
    last = name.rpartition("/")[2]
    parts = name.split("/")
    return not (
        any(part.endswith(".partial") for part in parts)
        or last.startswith(".lock")
        or parts[0] == "wandb"
    )


def _comes_last(name: str) -> bool:
    return name.rpartition("/")[2] in ("manifest.json", "index.json", "report.json")


def _lies_beside(name: str, others: Iterable[str]) -> bool:
    """Returns True if any of these files lies in the same folder, or below it."""
    folder = name.rpartition("/")[0]
    return any(not folder or other.startswith(f"{folder}/") for other in others)


def _remove_left(home: Path, key: str) -> None:
    """Removes the folders of processes that were killed."""
    for folder in home.glob(f"{key}-*"):
        number = folder.name.rpartition("-")[2]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            say(f"{visible(folder)}: left by a process that was killed; removed")
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, OSError):
            continue
