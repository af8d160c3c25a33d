"""TensorBoard's file of events, each on its way to disk when the call returns.

tensorboardX's own writer has a thread and a queue: where the disk is full the thread dies without a
word, and once the queue is full the run waits for it for ever.
"""

import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float


class EventFile:
    """A new file of events in a folder; OSError where it cannot be written.

    Args:
      purge_step: TensorBoard hides what earlier files have from this step on.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX.proto import event_pb2  # takes a second to import

        messages: Any = event_pb2  # made as it is imported, so no checker knows them
        self._event = messages.Event
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads them in the order of their names; as tensorboardX names them.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        used = sum(1 for _ in folder.glob(f"{name}*"))
        self._file = open(folder / (f"{name}.{used}" if used else name), "wb")
        self._write(file_version="brain.Event:2")
        start = messages.SessionLog(status=messages.SessionLog.START)
        self._write(step=purge_step, session_log=start)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers by name."""
        from tensorboardX import summary

        for name, value in values.items():
            self._write(step=step, summary=summary.scalar(name, value))
        self._file.flush()

    def image(self, step: int, name: str, image: Float[np.ndarray, "H W 3"]) -> None:
        """Adds an image with values in [0, 1]."""
        from tensorboardX import summary

        self._write(step=step, summary=summary.image(name, image, dataformats="HWC"))
        self._file.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """Adds a note."""
        from tensorboardX import summary

        self._write(step=step, summary=summary.text(name, text))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, **contents) -> None:
        """Writes a record: its length and that number's checksum, the event and its checksum."""
        from tensorboardX.record_writer import masked_crc32c

        data = self._event(wall_time=time.time(), **contents).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._file.write(b"".join([length, next(sums), data, next(sums)]))
