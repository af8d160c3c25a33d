"""A job's claim on its workdir: a second job is refused, and a disk that is not shared is noticed.

WORKDIR/.lock names who is at work: host, process number and a random token. Its time of change is a
sign of life, renewed every few seconds. A claim whose process is gone from this host, or that gave
no sign for a minute, is taken over.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from microdit_jax.errors import UserError, visible
from microdit_jax.files import disk_errors, parse_json
from microdit_jax.machine import watch

NAME = ".lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
_MOST_BYTES = 4096


class Claim:
    """The claim of this process on a folder, as a context manager; see `taken`.

    Attributes:
      token: random, in the folder's .lock alone.
    """

    def __init__(self, folder: Path, *, stale_seconds: float = STALE_SECONDS):
        """
        Raises:
          UserError: another job is at work there, or the folder cannot be written.
        """
        self.token = secrets.token_hex(8)
        self._folder, self._path = folder, folder / NAME
        self._stale, self._lost = stale_seconds, ""
        self._closing = threading.Event()
        with disk_errors(self._path):
            self._made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            self._take()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def check(self, *, now: bool = False) -> None:
        """Raises UserError if the folder is not this job's any more: moved, unmounted, taken over.

        Args:
          now: reads the folder; else what the last sign of life has found.
        """
        if now:
            self._look()
        if self._lost:
            raise UserError(self._lost)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            if _read(self._path).get("token") == self.token:
                self._path.unlink()
            if self._made:
                self._folder.rmdir()  # of a run that was refused before it wrote anything

    # ---------------------------------------------------------------- taking it
    def _take(self) -> None:
        first_seen, told = None, False
        while not self._create():
            try:
                about, changed = _read(self._path), self._path.stat().st_mtime
            except FileNotFoundError:
                continue
            first_seen = changed if first_seen is None else first_seen
            age = self._now() - changed
            if _is_gone(about) or age > self._stale:
                self._take_over()
                return
            who = f"process {about.get('pid', '?')} on {visible(about.get('host', '?'), 64)}"
            if changed != first_seen:
                raise UserError(
                    f"expected {visible(self._folder)} for this job alone, found another at work "
                    f"there: {who}; wait for it, end it, or give another --workdir"
                )
            if not told and age > 2 * BEAT_SECONDS:
                told = True
                print(
                    f"{visible(self._folder)}: {who} gave its last sign of life {age:.0f} s ago; "
                    f"this job goes on when that is {self._stale:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(0.5)

    def _create(self) -> bool:
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(file, "w") as lock:
            lock.write(self._contents())
        return True

    def _take_over(self) -> None:
        partial = self._path.with_name(f"{NAME}.{self.token}.partial")
        try:
            partial.write_text(self._contents())
            os.replace(partial, self._path)
        finally:
            partial.unlink(missing_ok=True)
        time.sleep(0.5)  # of two that take it over the second stays
        self.check(now=True)

    def _contents(self) -> str:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "processes": _process_space()}
        return json.dumps(who | {"token": self.token}) + "\n"

    def _now(self) -> float:
        """Returns the disk's time, which is not this host's."""
        probe = self._path.with_name(f"{NAME}.{self.token}.partial")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    # ---------------------------------------------------------------- keeping it
    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            self._look()
            if self._lost:
                watch.report(UserError(self._lost))  # the loop may wait in a collective
                return

    def _look(self) -> None:
        found, place = {}, visible(self._folder)
        try:
            found = _read(self._path)
            if found.get("token") == self.token:
                with contextlib.suppress(PermissionError):
                    os.utime(self._path)
                return
        except FileNotFoundError:
            pass
        except OSError:
            return  # a disk that fails says so where it is written
        if "token" in found:
            who = f"process {found.get('pid')} on {visible(found.get('host', '?'), 64)}"
            self._lost = f"expected {place} for this job alone, found it taken over by {who}"
        else:
            self._lost = (
                f"expected the workdir {place} as this run began it, found its {NAME} gone: the "
                "folder was moved, unmounted or emptied; put it back, and the same command goes on"
            )


def check_shared(folder: Path, token: str) -> None:
    """Checks that the folder is the one in which another process holds a claim with this token.

    Without a shared disk a checkpoint would be committed with this process's part missing.

    Raises:
      UserError: it is another folder, on another disk.
    """
    until = time.monotonic() + 5.0  # for a network's disk to show a new file
    while True:
        found = {}
        with contextlib.suppress(OSError):
            found = _read(folder / NAME)
        if found.get("token") == token:
            return
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    raise UserError(
        f"expected one workdir on a disk that all processes share, found that {visible(folder)} is "
        "another folder here than on process 0; mount the same disk on every host"
    )


def _read(path: Path) -> dict:
    with open(path, "rb") as file:
        text = file.read(_MOST_BYTES)
    try:
        found = parse_json(text)
        return found if isinstance(found, dict) else {}
    except ValueError:  # being written
        return {}


def _is_gone(about: dict) -> bool:
    """Returns True if the claim is of a process of this host that has ended, or is this one."""
    pid = about.get("pid")
    here = about.get("host") == socket.gethostname() and about.get("processes") == _process_space()
    if not here or type(pid) is not int or pid <= 0:
        return False
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _process_space() -> str:
    """Names the processes among which a number means this one: a container has its own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""
