"""The folder in memory where a target puts the file that its reader reads."""

import os
import shutil
import tempfile
from pathlib import Path


def memory_disk() -> str | None:
    """Returns a folder in memory; None where the system has none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Scratch:
    """A folder of one fuzzing process, on a memory disk where there is one."""

    def __init__(self):
        self.folder = Path(
            tempfile.mkdtemp(prefix="fuzz-", dir=os.environ.get("TMPDIR") or memory_disk())
        )

    def file(self, name: str, data: bytes) -> Path:
        """Writes a file and returns its path.

        A file of an earlier call is unlinked, not overwritten: views of it may still be mapped.
        """
        path = self.folder / name
        try:
            os.unlink(path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(descriptor, data)
        os.close(descriptor)
        return path

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
