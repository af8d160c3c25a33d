"""The key-value store of a job's coordination service, the one place that knows JAX's own client.

JAX has no public way to it; versions 0.8 to 0.10 have the same one. Values are short texts. Calls
are safe in threads, and use no device.
"""

import contextlib
import ctypes
import glob
import signal
import socket
from typing import Any

import jax

from microdit_jax.errors import UserError

_PREFIX = "microdit/"
_CALLS = ("key_value_set", "key_value_dir_get", "blocking_key_value_get")


class Unreachable(ConnectionError):
    """Process 0, which holds the store, has ended or closed its connection."""


def delay_aborts() -> None:
    """Lets C++ that aborts this process sleep for six seconds first.

    JAX's client aborts within a tenth of a second after process 0 has ended; the watch has that
    time for a line and a status of its own. (Its callback cannot be Python's: bad_cast.)
    """
    with contextlib.suppress(OSError, AttributeError):  # no such C library
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        # The handler's argument is the signal's number, and sleep's are seconds.
        assert signal.SIGABRT == 6
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def is_aborting() -> bool:
    """Returns True within those six seconds; False where the system does not tell."""
    ours, others = 1 << signal.SIGABRT - 1, 1 << signal.SIGTERM - 1
    for path in glob.glob("/proc/self/task/*/status"):
        with contextlib.suppress(OSError, ValueError), open(path) as status:
            blocked = int(status.read().partition("SigBlk:")[2].split(maxsplit=1)[0], 16)
            # A signal is blocked while its handler runs; some threads block all of them for ever.
            if blocked & ours and not blocked & others:
                return True
    return False


class Store:
    """The store of the job that this process has joined.

    Attributes:
      process_id: which process this is.
      num_processes: how many the job has.
    Raises:
      UserError: a version of JAX whose client is another.
    """

    def __init__(self):
        from jax._src import distributed

        state = distributed.global_state
        self._client: Any = state.client
        self.process_id = state.process_id
        self.num_processes = state.num_processes
        host, _, port = str(state.coordinator_address).rpartition(":")
        self._address = host.strip("[]"), int(port)
        absent = [name for name in _CALLS if not hasattr(self._client, name)]
        if absent:
            raise UserError(
                f"jobs of several processes need JAX's coordination client with {absent[0]}, found "
                f"none in jax {jax.__version__}; install a version between 0.8 and 0.10"
            )

    def put(self, key: str, value: str, *, replace: bool = False) -> bool:
        """Stores a value; returns False if the key has one already and `replace` is false.

        Raises:
          Unreachable: process 0 does not answer.
        """
        try:
            self._client.key_value_set(_PREFIX + key, value, allow_overwrite=replace)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise Unreachable(str(error)) from error
        return True

    def wait(self, key: str, seconds: float) -> str | None:
        """Returns the value of a key, waiting until it has one; None after `seconds`.

        Raises:
          Unreachable: process 0 does not answer.
        """
        try:
            return self._client.blocking_key_value_get(_PREFIX + key, max(1, int(seconds * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise Unreachable(str(error)) from error

    def wait_for(self, key: str) -> str:
        """Returns the value of a key that will come, unless its process ends and with it the job.

        Raises:
          Unreachable: process 0 does not answer.
        """
        while (value := self.wait(key, 60.0)) is None:
            continue
        return value

    def folder(self, name: str) -> dict[str, str]:
        """Returns the values of all keys "name/...", by what stands for the dots.

        Raises:
          Unreachable: process 0 does not answer.
        """
        try:
            found = self._client.key_value_dir_get(f"{_PREFIX}{name}/")
        except jax.errors.JaxRuntimeError as error:
            raise Unreachable(str(error)) from error
        return {key.rpartition("/")[2]: value for key, value in found}

    def is_closed(self) -> bool:
        """Returns True if the host of process 0 answers that nobody listens there any more."""
        try:
            socket.create_connection(self._address, timeout=1.0).close()
        except ConnectionRefusedError:
            return True
        except OSError:  # silence says nothing: the cable may be back soon
            pass
        return False
