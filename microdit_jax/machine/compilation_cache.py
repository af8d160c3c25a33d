"""The folder where compiled programs are kept between runs.

A process alone keeps them in the user's cache folder. JAX lets only process 0 of a job write, so
the processes of a job keep theirs in the run's workdir, which all of them see: after a restart
every host starts from there, wherever it runs.

A compiled program is machine code, and a workdir may be a stranger's. So the folder's name follows
from a secret of the user's, and programs that anybody else put there are not even looked for.
"""

import collections
import contextlib
import hmac
import secrets
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from microdit_jax.files import cache_folder, read_bytes, write_bytes
from microdit_jax.machine import hosts

MAX_BYTES = 20 << 30  # of all kept programs; a training step of XL/2 has about 0.1 GB
NAME = "compiled"  # of the folder in a run's workdir
_events: collections.Counter[str] = collections.Counter()
_enabled = False
_is_ours = False  # the folder was set here, and not by the user's JAX_COMPILATION_CACHE_DIR


def enable() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told where already."""
    global _is_ours, _enabled
    _enabled = True
    if not jax.config.values["jax_compilation_cache_dir"]:
        _is_ours = True
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        _use(cache_folder() / "xla")
    jax.monitoring.register_event_listener(_count_event)


def is_enabled() -> bool:
    """Returns True if this process keeps what it compiles, by `enable` and by JAX's setting."""
    # JAX makes this attribute at run time.
    return _enabled and bool(jax.config.jax_enable_compilation_cache)  # pyright: ignore[reportAttributeAccessIssue]


def share(workdir: Path, secret: str | None = None) -> None:
    """Keeps the programs of a job with several processes in its workdir; call it after joining.

    Nothing changes for a process alone, or where the user's JAX_COMPILATION_CACHE_DIR says where.

    Args:
      secret: what names the folder, unknown to strangers; None: a random one that process 0 keeps
        in its user's cache folder.
    """
    if _is_ours and jax.process_count() > 1:
        name = hosts.from_first("name compiled programs", lambda: _folder_name(secret))
        _use(workdir / name)


def _folder_name(secret: str | None) -> str:
    if secret is None:
        path = cache_folder() / "secret"
        if not path.exists():
            write_bytes(path, secrets.token_hex(16).encode(), replace=False, mode=0o600)
        secret = read_bytes(path, 4096).decode()
    return f"{NAME}-{hmac.new(secret.encode(), NAME.encode(), 'sha256').hexdigest()[:32]}"


def _use(folder: Path) -> None:
    # Before a job is joined nobody knows which process this is, and asking would open the devices.
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        trim(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # or JAX does not look at the setting again


def trim(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Deletes the programs that were used longest ago, so that `max_bytes` are left at most.

    JAX's own limit locks the folder at each access, on a shared disk for all hosts at once.
    """
    used = []
    with contextlib.suppress(OSError):  # absent, or not ours to read
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # deleted by another process
                about = path.stat()
                used.append((max(about.st_atime, about.st_mtime), about.st_size, path))
    left = max_bytes
    for _, size, path in sorted(used, reverse=True):
        left -= size
        if left < 0:
            with contextlib.suppress(OSError):
                path.unlink()


def _count_event(event: str, **_) -> None:
    _events[event] += 1


def hits() -> int:
    """Returns how many programs came from the cache in this process."""
    return _events["/jax/compilation_cache/cache_hits"]


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Compiles what is inside without the cache."""
    # JAX makes this attribute at run time.
    kept = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or JAX does not look at the setting again
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def compiled_programs() -> str:
    """Returns how many programs XLA compiled in this process, to end a line of a report."""
    compiled = _events["/jax/compilation_cache/cache_misses"]
    return f"; {compiled} programs compiled, {hits()} from the cache"
