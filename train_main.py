"""Trains one stage of MicroDiT; the same command again resumes.

Example:
  python train_main.py --config=configs/demo.py:pretrain --workdir=out/demo/pretrain \
      --config.train.batch_size=32
"""

from absl import app, flags
from ml_collections import config_flags

from microdit_jax.cli import read_config, run

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with its variant.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and samples go.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    from microdit_jax.train import train  # after the flags: --help answers at once

    train(read_config(CONFIG), WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run(main)
