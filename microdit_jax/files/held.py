"""Folders held open: files are read and made below them, and no link on the way is followed.

A dataset of a stranger, or a cache in a folder that others may write too, can hold links that lead
anywhere. Every step here is taken from the folder's own descriptor, so that none of them counts.
"""

import contextlib
import errno
import os
import secrets
import stat
import weakref
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from microdit_jax.errors import UserError, visible
from microdit_jax.files.writing import disk_errors

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class HeldFolder:
    """A folder by its descriptor. Names are relative, with "/" between folders.

    Attributes:
      path: for messages.
    """

    def __init__(self, path: str | os.PathLike, *, own: bool = False):
        """Opens a folder.

        Args:
          own: make the folder if it is not there, and take only what this user made: the folder
            must be no link and nobody else's, and so must every file. A folder that others of a
            group may write is closed to them.
        Raises:
          UserError: there is no such folder, or it is not this user's own.
        """
        self.path, self._owner = Path(path), None
        if not own:
            with disk_errors(path):
                self._descriptor = os.open(path, _FOLDER & ~os.O_NOFOLLOW)
            weakref.finalize(self, os.close, self._descriptor)
            return
        with disk_errors(path):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._no_link(self.path.name):
                self._descriptor = os.open(path, _FOLDER)
            weakref.finalize(self, os.close, self._descriptor)
            # The user's number as this file system has it: some give all files to one user.
            name = f".{secrets.token_hex(8)}.partial"
            probe = os.open(name, _NEW, 0o600, dir_fd=self._descriptor)
            self._owner = os.fstat(probe).st_uid
            os.close(probe)
            os.unlink(name, dir_fd=self._descriptor)
        state = os.fstat(self._descriptor)
        if state.st_uid != self._owner:
            raise UserError(
                f"expected the folder {visible(path)} to be this user's own, found it to be user "
                f"{state.st_uid}'s; give another"
            )
        if state.st_mode & 0o022:
            with disk_errors(path):
                os.fchmod(self._descriptor, stat.S_IMODE(state.st_mode) & ~0o022)

    def open(self, name: str) -> BufferedReader | None:
        """Opens a regular file for reading; None if there is none, or another user's.

        Raises:
          UserError: a link, a pipe or a device is there, or it cannot be opened.
        """
        with disk_errors(self.path / name):
            try:
                with self._folder_of(name) as (folder, last), self._no_link(name):
                    descriptor = os.open(last, _FILE, dir_fd=folder)
            except FileNotFoundError:
                return None
        state = os.fstat(descriptor)
        foreign = self._owner is not None and (state.st_uid, state.st_nlink) != (self._owner, 1)
        if not stat.S_ISREG(state.st_mode) or foreign:
            os.close(descriptor)
            if foreign:
                return None
            raise UserError(f"expected a file at {visible(self.path / name)}, found something else")
        return os.fdopen(descriptor, "rb")

    def make(
        self,
        name: str,
        data: memoryview,
        check: Callable[[], None] = lambda: None,
    ) -> BufferedReader:
        """Writes a file whole or not at all, and returns it open, before anybody could remove it.

        Args:
          check: called before the file takes its name; what it raises leaves nothing behind.
        Raises:
          UserError: a link is on the way, or the file cannot be written.
        """
        check()
        with disk_errors(self.path / name, len(data)):
            with self._folder_of(name, make=True) as (folder, last):
                partial = f".{last}.{secrets.token_hex(8)}.partial"
                descriptor = os.open(partial, _NEW, 0o666, dir_fd=folder)
                try:
                    with os.fdopen(os.dup(descriptor), "wb") as file:
                        file.write(data)
                    os.rename(partial, last, src_dir_fd=folder, dst_dir_fd=folder)
                except BaseException:
                    os.close(descriptor)
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(partial, dir_fd=folder)
                    raise
        os.lseek(descriptor, 0, os.SEEK_SET)
        return os.fdopen(descriptor, "rb")

    def remove(self, name: str) -> None:
        """Removes a file, if it is there; a link itself, not what it leads to."""
        with disk_errors(self.path / name), contextlib.suppress(FileNotFoundError):
            with self._folder_of(name) as (folder, last):
                os.unlink(last, dir_fd=folder)

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yields the name and state of every regular file; links are left out."""
        for top, _, names, folder in os.fwalk(".", dir_fd=self._descriptor):
            for name in names:
                with contextlib.suppress(OSError):  # other processes move and remove files
                    state = os.lstat(name, dir_fd=folder)
                    if stat.S_ISREG(state.st_mode):
                        yield os.path.normpath(os.path.join(top, name)), state

    @contextlib.contextmanager
    def _folder_of(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Opens a file's folder step by step; gives its descriptor and the file's own name."""
        *parents, last = name.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in (*parents, last)):
            raise UserError(
                f"expected the name of a file below {visible(self.path)}, found {visible(name)}"
            )
        with contextlib.ExitStack() as stack:
            folder = self._descriptor
            for part in parents:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=folder)
                with self._no_link(name):
                    folder = os.open(part, _FOLDER, dir_fd=folder)
                stack.callback(os.close, folder)
            yield folder, last

    @contextlib.contextmanager
    def _no_link(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # A link where a folder is expected is "not a directory" on some systems.
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise UserError(
                f"expected {visible(name)} inside {visible(self.path)}, found a link on the way, "
                "or a file where a folder is expected; copy what it leads to"
            ) from error
