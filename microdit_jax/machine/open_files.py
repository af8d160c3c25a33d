"""The limit of open files of a process, raised as far as the system lets us."""

import contextlib
import resource

from microdit_jax.errors import UserError

SPARE = 128  # for connections, devices, checkpoints and logs


def raise_limit() -> int:
    """Raises the soft limit to the hard one, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS takes less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft


def check_room(files: int, what: str) -> None:
    """Raises UserError if the process may not open so many files at a time."""
    limit = raise_limit()
    if limit not in (resource.RLIM_INFINITY, -1) and files + SPARE > limit:
        raise UserError(
            f"{what} needs {files:,} open files and {SPARE} to spare, found a limit of {limit:,}; "
            "raise it (ulimit -n, LimitNOFILE= of a service, nofile of a container), or write the "
            "dataset in larger shards"
        )
