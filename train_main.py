"""Trains MicroDiT, one stage or several; the same command again resumes.

Examples:
  python train_main.py --config=configs/demo.py:pretrain --workdir=out/demo/pretrain \\
      --config.train.batch_size=32
  python train_main.py --config=configs/recipe.py:mesh=-1x8x1 --workdir=runs/all

With several processes (docs/scaling.md), start this on each of them.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from microdit_jax.commands.cli import absl_command
from microdit_jax.files import check_writable

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with its variants.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and samples go.")
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0; not needed on SLURM, GKE and TPU VMs."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
JOB_TOKEN = flags.DEFINE_string(
    "job_token", None, "A text known to this job's processes alone, the same on all: calls without "
    "it are not counted. Default: SLURM's or Open MPI's number of the job, where they describe it. "
    "--flagfile keeps it off the list of processes."
)  # fmt: skip
TIMEOUT = flags.DEFINE_float("join_timeout", 300, "Seconds to wait for the other processes.")
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "Seconds of silence after which a process is given up."
)


@absl_command(required=("config", "workdir"))
def main():
    from microdit_jax.machine import hosts  # after the flags: --help answers at once

    workdir, config = str(WORKDIR.value), CONFIG.value
    check_writable(workdir, folder=True)
    with hosts.job(
        COORDINATOR.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        job_token=JOB_TOKEN.value,
        timeout_seconds=TIMEOUT.value,
        heartbeat_seconds=HEARTBEAT.value,
    ):
        from microdit_jax.machine import compilation_cache
        from microdit_jax.train import train, train_stages

        compilation_cache.share(Path(workdir), JOB_TOKEN.value)
        (train_stages if "stages" in config else train)(config, workdir)
