"""Trains MicroDiT, one stage or several; the same command again resumes.

Examples:
  python train_main.py --config=configs/demo.py:pretrain --workdir=out/demo/pretrain \\
      --config.train.batch_size=32
  python train_main.py --config=configs/recipe.py:mesh=-1x8x1 --workdir=runs/all

With several processes (docs/scaling.md), start this on each of them. The exit status is 0 when all
steps are done; 75 when a signal stopped it before, or another process is gone, and the same command
goes on: until python train_main.py ...; do sleep 1; done
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from microdit_jax.commands import job_flags
from microdit_jax.commands.cli import absl_command
from microdit_jax.files import check_writable
from microdit_jax.files.urls import scheme_of

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with its variants.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and samples go.")
HEALTH = flags.DEFINE_string(
    "health_file", None, "A local file that this process writes every few seconds while it goes "
    "on: the last step's number and time, for a probe of its health."
)  # fmt: skip
flags.adopt_module_key_flags(job_flags)


@absl_command(required=("config", "workdir"))
def main():
    workdir, config = str(WORKDIR.value), CONFIG.value
    check_writable(workdir, folder=True)
    from microdit_jax.training import goodput  # after the flags: --help answers at once

    goodput.watch_this_process(HEALTH.value)
    # Before the job, so that hosts that differ are told apart as soon as all are there.
    from microdit_jax.machine import compilation_cache
    from microdit_jax.train import train_all

    with job_flags.joined_job():
        if not scheme_of(workdir):
            compilation_cache.share(Path(workdir), job_flags.JOB_TOKEN.value)
        done = train_all(config, workdir)
    if not done:
        job_flags.end_early()
