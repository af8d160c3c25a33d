"""Files as memory, without an open file each.

Python's own maps keep a descriptor, and a batch of 2,048 records may lie in 2,000 shards: more than
the 1,024 files that a process may open on most systems.
"""

import ctypes
import mmap
import os
import sys
import weakref
from typing import BinaryIO

_PROT_READ, _MAP_SHARED, _FAILED = 1, 1, ctypes.c_void_p(-1).value  # Linux's and macOS's


def map_file(file: BinaryIO) -> memoryview:
    """Maps a whole file for reading; it may be closed, and stays mapped while any view is used.

    Raises:
      OSError: the system cannot map it.
      ValueError: it is empty.
    """
    if sys.version_info >= (3, 13):
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, trackfd=False))
    if sys.platform not in ("linux", "darwin"):
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise ValueError("cannot map an empty file")
    address = _libc.mmap(None, size, _PROT_READ, _MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    array = (ctypes.c_char * size).from_address(address)
    # All views, NumPy's too, hold the array; the last one takes the map away.
    weakref.finalize(array, _libc.munmap, ctypes.c_void_p(address), size).atexit = False
    return memoryview(array).cast("B").toreadonly()


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
