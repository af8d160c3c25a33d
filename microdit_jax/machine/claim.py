"""A job's claim on a folder: a second job is refused, and a disk that is not shared is noticed.

FOLDER/.lock (files.lock) names who is at work: host, process number and a random token. It gets a
sign of life every few seconds. A claim whose process is gone from this host, or that gave no sign
for a minute, is taken over.
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
from microdit_jax.files.lock import NAME, Held, LockFile, lock_of
from microdit_jax.machine import hosts, watch

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


class Claim:
    """The claim of this process on a folder, as a context manager.

    Attributes:
      token: random, in the folder's .lock alone.
    """

    def __init__(
        self, folder: Path, *, lock: LockFile | None = None, stale_seconds: float = STALE_SECONDS
    ):
        """
        Args:
          lock: where the claim is kept; by default the folder's own.
        Raises:
          UserError: another job is at work there, or the folder cannot be written.
        """
        self.token = secrets.token_hex(8)
        self._folder, self._lock = folder, lock or lock_of(folder)
        self._stale, self._lost = stale_seconds, ""
        self._closing = threading.Event()
        with disk_errors(folder / NAME):
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
            held = self._lock.read()
            if held is not None and owner_of(held).get("token") == self.token:
                self._lock.remove(held)

    # ---------------------------------------------------------------- taking it
    def _take(self) -> None:
        first_seen, told, place = None, False, visible(self._folder)
        while not self._lock.create(owner_text(self.token)):
            held = self._lock.read()
            if held is None:
                continue
            about = owner_of(held)
            if is_gone(about) or held.age > self._stale:
                if self._lock.replace(held, owner_text(self.token)):
                    return
                time.sleep(0.5)  # another one takes it over
                continue
            first_seen = first_seen or held.version
            if held.version != first_seen:
                raise UserError(
                    f"expected {place} for this job alone, found another at work there: "
                    f"{name_of(about)}, which gave a sign of life {held.age:.0f} s ago; wait for "
                    "it, end it, or give another folder"
                )
            if not told and held.age > 2 * BEAT_SECONDS:
                told = True
                print(
                    f"{place}: {name_of(about)} gave its last sign of life {held.age:.0f} s ago; "
                    f"this job goes on when that is {self._stale:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(0.5)

    # ---------------------------------------------------------------- keeping it
    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            self._look()
            if self._lost:
                watch.report(UserError(self._lost))  # the loop may wait in a collective
                return

    def _look(self) -> None:
        place = visible(self._folder)
        try:
            held = self._lock.read()
            if held is not None and owner_of(held).get("token") == self.token:
                self._lock.renew(held)
                return
        except OSError:
            return  # a disk that fails says so where it is written
        if held is None or not (about := owner_of(held)):
            self._lost = (
                f"expected {place} as this job began it, found its {NAME} gone: the folder was "
                "moved, unmounted or emptied; put it back, and the same command goes on"
            )
        else:
            self._lost = (
                f"expected {place} for this job alone, found it taken over by {name_of(about)}"
            )


def claimed(
    folder: Path, stack: contextlib.ExitStack, *, place: str | os.PathLike | None = None
) -> Claim | None:
    """Claims a folder for this job until the stack ends, and checks that all processes see it.

    Args:
      place: the bucket's URL that the folder stands for, where it stands for one.
    Returns:
      The claim, which process 0 holds; None on the others.
    Raises:
      UserError: another job is at work there, or a process has no such disk.
    """
    claims: list[Claim] = []

    def take() -> str:
        claims.append(stack.enter_context(Claim(folder, lock=lock_of(place or folder))))
        return claims[0].token

    token = hosts.from_first("claim the folder", take)
    if not claims:
        check_shared(place or folder, token)
    return claims[0] if claims else None


def check_shared(folder: str | os.PathLike, token: str) -> None:
    """Checks that the folder is the one in which another process holds a claim with this token.

    Without a shared disk a checkpoint would be committed with this process's part missing.

    Raises:
      UserError: it is another folder, on another disk.
    """
    lock, until = lock_of(folder), time.monotonic() + 5.0  # for a network's disk to show a new file
    while True:
        held = None
        with contextlib.suppress(OSError):
            held = lock.read()
        if held is not None and owner_of(held).get("token") == token:
            return
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    raise UserError(
        f"expected {visible(folder)} on a disk that all processes share, found another folder here "
        "than on process 0; mount the same disk on every host"
    )


def owner_text(token: str) -> str:
    """Returns what this process writes into a lock that it holds."""
    who = {"host": socket.gethostname(), "pid": os.getpid(), "processes": _process_space()}
    return json.dumps(who | {"token": token}) + "\n"


def owner_of(held: Held) -> dict:
    """Returns what a lock's text says; {} while it is being written."""
    try:
        found = parse_json(held.text)
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}


def name_of(about: dict) -> str:
    """Names the owner of a lock, for messages."""
    return f"process {visible(about.get('pid', '?'), 20)} on {visible(about.get('host', '?'), 64)}"


def is_gone(about: dict) -> bool:
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
