"""Flags of the commands whose processes may work together as one job, and how they join it."""

import contextlib
from collections.abc import Iterator

from absl import flags

from microdit_jax.commands import output

COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0; not needed on SLURM, GKE and TPU VMs."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes work together.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
JOB_TOKEN = flags.DEFINE_string(
    "job_token", None, "A text known to this job's processes alone, the same on all: calls without "
    "it are not counted. Default: SLURM's or Open MPI's number of the job, where they describe it. "
    "--flagfile keeps it off the list of processes."
)  # fmt: skip
TIMEOUT = flags.DEFINE_float(
    "join_timeout", 300, "Seconds to wait for the other processes.", lower_bound=0
)
HEARTBEAT = flags.DEFINE_float(
    "heartbeat_timeout", 25, "Seconds of silence after which a process is given up: all others end "
    "within five more, with status 75.", lower_bound=5,
)  # fmt: skip
EXIT_ZERO = flags.DEFINE_boolean(
    "exit_zero_on_stop", False, "End with status 0, and not 75, where a signal stopped the command "
    "before its end: for schedulers that take any other status for a failure."
)  # fmt: skip


@contextlib.contextmanager
def joined_job() -> Iterator[None]:
    """Joins the job that the flags or the cluster's environment describe, for a command's work."""
    from microdit_jax.machine import hosts, interrupts, watch  # after the flags: --help is quick

    if EXIT_ZERO.value:
        interrupts.set_status_if_stopped(0)
    with hosts.job(
        COORDINATOR.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        job_token=JOB_TOKEN.value,
        timeout_seconds=TIMEOUT.value,
        heartbeat_seconds=HEARTBEAT.value,
    ):
        if (job := watch.current()) is not None:
            job.library_log = output.divert_libraries()
        yield


def end_early() -> None:
    """Ends a command that has saved and stopped before its end; call it outside of the job.

    Raises:
      SystemExit: with status 75, or 0 by --exit_zero_on_stop.
    """
    from microdit_jax.machine import interrupts

    raise SystemExit(interrupts.status_if_stopped(interrupts.STOPPED_EARLY))
