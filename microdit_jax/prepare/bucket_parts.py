"""Parts of a job whose output is a bucket, for several hosts that share nothing else.

Each writes to a local folder, from which the parts go to the bucket. A part counts when its index
is there, which is sent last. Where the store writes an object only over a certain generation, parts
are claimed there; on others each host does all of them.
"""

from collections.abc import Iterable

from microdit_jax.data.mds_format import INDEX, SUFFIX
from microdit_jax.files import OutputFolder
from microdit_jax.files.bucket import Bucket
from microdit_jax.files.lock import LockFile, lock_of
from microdit_jax.files.urls import scheme_of


class BucketParts:
    """The parts of a job in its bucket."""

    def __init__(self, into: OutputFolder, names: Iterable[str]):
        """
        Args:
          into: the bucket's folder, and the local one in its place.
          names: of the parts. What was fetched of one that is not whole is forgotten.
        """
        self._into, self._bucket = into, Bucket(into.name)
        self._whole: set[str] = set()
        for name in names:
            folder = into.path / name
            if folder.exists() and not (folder / INDEX).exists():
                into.forget(name)

    def lock_of(self, folder: str) -> LockFile:
        """Returns the lock of a folder in the bucket."""
        return lock_of(f"{self._into.name}/{folder}")

    def done(self, names: Iterable[str]) -> set[str]:
        """Returns which of these parts are whole in the bucket."""
        wanted = set(names)
        begun = sorted(wanted.intersection(self._bucket.entries()) - self._whole)
        self._whole.update(
            name for name, ok in zip(begun, self._are_whole(begun), strict=True) if ok
        )
        return self._whole & wanted

    def is_done(self, name: str) -> bool:
        """Returns True if this part is whole in the bucket."""
        if name not in self._whole and self._bucket.stat(f"{name}/{INDEX}") is not None:
            self._whole.add(name)
        return name in self._whole

    def send(self) -> None:
        """Returns when all that was written here is in the bucket."""
        self._into.flush()

    def fetch(self, names: Iterable[str]) -> None:
        """Fetches what others wrote of these parts, but for their shards."""
        for name in names:
            if not (self._into.path / name).exists():
                below = [n for n in self._bucket.objects(name) if SUFFIX not in n]
                self._bucket.each(lambda n: self._bucket.download(n, self._into.path / n), below)

    def remove(self, folder: str) -> None:
        """Removes what is left below a folder of the bucket."""
        self._bucket.remove(self._bucket.objects(folder))

    def _are_whole(self, names: list[str]) -> list[bool]:
        return self._bucket.each(
            lambda name: self._bucket.stat(f"{name}/{INDEX}") is not None, names
        )


def parts_in_bucket(into: OutputFolder, names: Iterable[str]) -> BucketParts | None:
    """Returns the parts of an output in a bucket where hosts can claim them, else None."""
    return BucketParts(into, names) if scheme_of(into.name) == "gs" else None
