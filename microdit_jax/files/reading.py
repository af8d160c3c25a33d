"""Reads of files that anybody may have written: bounded, of regular files, inside their folder.

Whatever a person fetched goes through these functions, so that no header decides how much memory
is taken, no link leads out of a folder, and no pipe or device is waited for.
"""

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from microdit_jax.errors import UserError, visible

MAX_TEXT = 256 << 20  # bytes of a JSON or text file that is read whole
MAX_ARRAYS = 1 << 30  # bytes of an .npz's arrays, if its file is not half as large


def open_regular(path: str | os.PathLike) -> BufferedReader:
    """Opens a regular file for reading; a pipe, a device or a folder is refused and not waited for.

    Raises:
      OSError: the file cannot be opened.
      UserError: it is no regular file.
    """
    # O_NONBLOCK: opening a pipe that nobody writes would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise UserError(f"expected a regular file, found a pipe or device: {visible(path)}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_at_most(file: Any, num_bytes: int, what: object) -> bytes:
    """Reads a binary stream to its end, whatever its headers say of its length.

    Args:
      file: anything with `read(size)`, such as a member of an archive.
      num_bytes: most bytes that are read; more are an error.
      what: names the stream in that error.
    Raises:
      UserError: the stream goes on past `num_bytes`.
    """
    parts, total = [], 0
    while part := file.read(min(1 << 20, num_bytes + 1 - total)):
        parts.append(part)
        total += len(part)
        if total > num_bytes:
            raise UserError(f"expected at most {num_bytes:,} bytes in {visible(what)}, found more")
    return b"".join(parts)


def read_bytes(path: str | os.PathLike, num_bytes: int = MAX_TEXT) -> bytes:
    """Reads a regular file of at most `num_bytes` bytes whole.

    Raises:
      OSError: the file cannot be opened.
      UserError: it is larger, or no regular file.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > num_bytes:
            raise UserError(f"expected at most {num_bytes:,} bytes in {visible(path)}, found more")
        return read_at_most(file, num_bytes, path)


def inside(root: str | os.PathLike, name: str) -> Path:
    """Returns the path of `name`, which must lie below the folder `root` with its links followed.

    Raises:
      UserError: the name is absolute, empty or no text, or it leads out of the folder by ".." or
        by a link.
    """
    root = Path(root)
    if not isinstance(name, str) or not name or "\0" in name or os.path.isabs(name):
        raise UserError(f"expected the name of a file below {visible(root)}, found {name!r}")
    path = root / name
    real, real_root = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, real_root]) != real_root or real == real_root:
        raise UserError(f"expected a file inside {visible(root)}, found {name!r}, which leads out")
    return path


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """Parses JSON of any origin.

    Args:
      unique_keys: refuse an object that has a key twice; else the last one counts.
    Raises:
      ValueError: no JSON, not UTF-8, nested too deep, or with numbers or texts that cannot be
        handled further (lone surrogates).
    """
    try:
        if isinstance(text, bytes | bytearray):
            text = bytes(text).decode("utf-8-sig")
        contents = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
        if "\\u" in text:  # only an escape can bring half of a surrogate pair
            json.dumps(contents, ensure_ascii=False).encode()
        return contents
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes the dict of a JSON object; raises ValueError if a key stands in it twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{visible(key)} twice")
        found[key] = value
    return found


def read_json(path: str | os.PathLike, num_bytes: int = MAX_TEXT) -> dict[str, Any]:
    """Reads a JSON object of at most `num_bytes` bytes.

    Raises:
      OSError: the file cannot be opened.
      UserError: damaged, too large, or not an object.
    """
    text = read_bytes(path, num_bytes)
    try:
        contents = parse_json(text)
    except ValueError as error:
        raise UserError(
            f"expected JSON in {visible(path)}, found damage ({error}); make or fetch it again"
        ) from error
    if not isinstance(contents, dict):
        raise UserError(
            f"expected a JSON object in {visible(path)}, found {type(contents).__name__}; make or "
            "fetch it again"
        )
    return contents


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz; never unpickles.

    Raises:
      OSError: the file cannot be opened.
      ValueError: it is damaged, no .npz, or compressed so well that it would fill the memory.
    """
    with open_regular(path) as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                stated = sum(member.file_size for member in arrays.zip.infolist())
                if stated > max(MAX_ARRAYS, 2 * os.fstat(file.fileno()).st_size):
                    raise ValueError(f"{stated:,} bytes of arrays in a small file")
                found = {name: arrays[name] for name in arrays.files}
                # A member that does not begin as an array is given as its bytes.
                if not all(isinstance(array, np.ndarray) for array in found.values()):
                    raise ValueError("a member that is no array")
                return found
        except Exception as error:  # damage is raised by zipfile, zlib, the header's parser, ...
            raise ValueError(f"{type(error).__name__}: {error}") from error
