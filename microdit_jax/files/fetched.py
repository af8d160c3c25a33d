"""Inputs on a bucket: copied to the cache folder once, and again when they changed."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from microdit_jax.errors import UserError, visible
from microdit_jax.files.bucket import FIRST_SECONDS, SCHEMES, Bucket, Object
from microdit_jax.files.places import cache_folder
from microdit_jax.files.urls import as_given, scheme_of, show_as
from microdit_jax.files.writing import atomic_folder, disk_errors


def everything(names: Collection[str]) -> Iterable[str]:
    """Chooses all files of a folder."""
    return names


def fetched(
    path: str | os.PathLike,
    *,
    choose: Callable[[Collection[str]], Iterable[str]] = everything,
) -> Path:
    """Returns the local path of an input: of a URL a copy in the cache folder, of the same name.

    Args:
      path: a file or folder, local or on a bucket. A local one is returned as it is.
      choose: takes the names of a folder's files and gives those that are needed.
    Raises:
      UserError: nothing there, no right to it, or it changes while it is fetched.
    """
    if scheme_of(path) not in SCHEMES:
        return Path(path)
    url = as_given(path).rstrip("/")
    above, _, name = url.rpartition("/")
    if above.endswith("/"):
        raise UserError(f"expected a file or folder in the bucket {visible(url)}; name one")
    bucket = Bucket(above, seconds=FIRST_SECONDS)
    about = bucket.stat(name)
    if about is not None:
        found, bucket = {name: about}, bucket
    else:
        bucket = Bucket(url)
        found = bucket.objects()
        chosen = set(choose(found.keys()))
        found = {n: o for n, o in found.items() if n in chosen and _is_plain(n)}
    if not found:
        bucket.check_bucket()
        raise UserError(f"expected a file or folder at {visible(url)}, found none; check the path")
    digest = hashlib.sha256(repr((url, sorted(found.items()))).encode()).hexdigest()[:16]
    folder = cache_folder() / "fetched" / digest
    local = folder / name
    show_as(local, url)
    if not folder.exists():
        size = sum(o.size for o in found.values())
        with atomic_folder(folder, size, keep=folder.exists) as partial:
            into = partial if about is not None else partial / name
            bucket.each(lambda n: _download(bucket, n, found[n], into / n), found)
    with disk_errors(folder):
        os.utime(folder)  # when it was last used
    return local


def _download(bucket: Bucket, name: str, about: Object, local: Path) -> None:
    bucket.download(name, local)
    if (size := local.stat().st_size) != about.size:
        raise UserError(
            f"expected {about.size:,} bytes in {bucket.url}/{name}, found {size:,}: it changes "
            "while it is read; wait for who writes it"
        )


def _is_plain(name: str) -> bool:
    """Returns True for a name that stays inside its folder."""
    return not any(part in ("", ".", "..") or "\0" in part for part in name.split("/"))
