"""Puts batches on the devices before they are asked for, by a thread of its own."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from microdit_jax.machine.background import give_way


class Prefetch:
    """Iterator over batches that a thread reads and puts on the devices, some ahead.

    A context manager; leaving it, or `close`, ends the thread.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        put: Callable[[Any], Any],
        *,
        ahead: int = 2,
        warn_after: float = 60.0,
    ):
        """
        Args:
          batches: from `pipeline.batches`.
          put: puts a batch on the devices, as `jax.device_put` with a sharding does.
          ahead: batches kept on the devices; each takes device memory.
          warn_after: seconds of waiting after which the log says which stage is stuck.
        """
        self._batches, self._put, self._warn_after = batches, put, warn_after
        self._ready: queue.Queue = queue.Queue(ahead)
        self._closing, self._stage = threading.Event(), "reading"
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Any:
        start = time.monotonic()
        while True:
            try:
                kind, value = self._ready.get(timeout=self._warn_after)
                break
            except queue.Empty:
                logging.getLogger(__name__).warning(
                    "waited %.0f s for a batch: the loader is %s",
                    time.monotonic() - start,
                    self._stage,
                )
        if kind == "batch":
            return value
        self._ready.put((kind, value))  # for whoever asks again
        raise StopIteration if kind == "end" else value

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread after the batch it works on, and closes the iterator behind it."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()  # makes room for a thread that waits to hand over
            except queue.Empty:
                self._thread.join(0.01)

    def _work(self) -> None:
        give_way()
        try:
            while not self._closing.is_set():
                self._stage = "reading"
                try:
                    batch = next(self._batches)
                except StopIteration:
                    self._ready.put(("end", None))
                    return
                self._stage = "putting a batch on the devices"
                on_devices = self._put(batch)
                self._stage = "done ahead"
                self._ready.put(("batch", on_devices))
        except BaseException as error:  # reaches the caller of next()
            self._ready.put(("error", error))
        finally:
            if isinstance(self._batches, Generator):
                self._batches.close()
