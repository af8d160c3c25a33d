"""Compiles training or sampling for a machine you do not have, and reports what it needs there.

Examples:
  python -m microdit_jax.xla.aot --config=configs/res_256_pretrain.py:mesh=1x8x1 \\
      --topology=h100:8 --config.train.micro_batch_size=64 --report=out/aot/stage1.json
  python -m microdit_jax.xla.aot --config=configs/res_256_pretrain.py:mesh=1x16x1 \\
      --topology=v5e:4x4 --config.model.options.remat=block --reduced_depth
  python -m microdit_jax.xla.aot --config=configs/res_512_pretrain.py --topology=h100:8 --find
  python -m microdit_jax.xla.aot --config=configs/res_512_finetune.py --topology=h100:8 \\
      --what=sampler --images=64

Needs no accelerator, only its compiler: pip install 'microdit_jax[aot]'. No weight is allocated.
Compiling takes minutes; programs that were compiled before come from a cache.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.xla.aot.__main__")

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from microdit_jax.commands.cli import absl_command
from microdit_jax.errors import UserError
from microdit_jax.files import check_writable

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with its variants.")
TOPOLOGY = flags.DEFINE_string("topology", None, "h100:8, h100:8x8, v5e:4x4, 2*v5e:4x4, cpu:8, ...")
WHAT = flags.DEFINE_enum("what", "train_step", ["train_step", "sampler"], "What to compile.")
IMAGES = flags.DEFINE_integer(
    "images", 64, "Images sampled at a time, over all chips.", lower_bound=1
)
START = flags.DEFINE_integer(
    "start_step", 0, "Step at which the stage starts, for its days.", lower_bound=0
)
REPORT = flags.DEFINE_string("report", None, "JSON file to write; the table goes beside it.")
FIND = flags.DEFINE_boolean("find", False, "Search the largest train.micro_batch_size that fits.")
REDUCED = flags.DEFINE_boolean(
    "reduced_depth", False, "Compile four shallow networks and extrapolate, for slow compilers."
)
SAVE = flags.DEFINE_boolean(
    "save", False, "Keep the compiled step in this user's cache folder, for train_main.py here."
)
DUMP = flags.DEFINE_string("dump", None, "Folder for the optimised HLO.")


@absl_command(required=("config", "topology"))
def main():
    config = CONFIG.value
    if "stages" in config:
        raise UserError(
            f"--config must be one stage, found {', '.join(config.stages)}; give the file of one"
        )
    if START.value >= config.train.steps:
        raise UserError(
            f"--start_step must be below the stage's {config.train.steps} steps, found "
            f"{START.value}"
        )
    if (FIND.value or REDUCED.value) and WHAT.value != "train_step":
        raise UserError("--find and --reduced_depth take --what=train_step, found sampler")
    if SAVE.value and (FIND.value or REDUCED.value or WHAT.value != "train_step"):
        raise UserError(
            "--save keeps one whole training step, found --find, --reduced_depth or --what=sampler"
        )
    if REPORT.value:
        check_writable(REPORT.value)
    if DUMP.value:
        check_writable(DUMP.value, folder=True)
    from microdit_jax.xla import topologies  # after the flags, so that --help is quick

    name = str(TOPOLOGY.value)
    topologies.prepare(name)
    from microdit_jax.xla.aot import analysis, search, table

    request = analysis.CompileRequest(
        config,
        topologies.get(name),
        Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem,
        what=WHAT.value,
        images=IMAGES.value,
        start_step=START.value,
        reduced_depth=REDUCED.value,
        dump=Path(DUMP.value) if DUMP.value else None,
        save=SAVE.value,
    )
    found = search.find(request) if FIND.value else analysis.analyse(request)
    print(table.render(found))
    if REPORT.value:
        table.write(found, Path(REPORT.value))
