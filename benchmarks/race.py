"""A race: ideas against the recipe, on the same data with the same operations of the network.

  python -m benchmarks.race --steps=1400 --out=out/race                        # hours on two cores
  python -m benchmarks.race --candidates=adamw,muon --steps=300 --out=out/short
  python -m benchmarks.race --candidates=masked,routed --resolution=64 --data=out/data/twemoji_64
  python -m benchmarks.race --count                        # operations, by models/flops.py and XLA

Each candidate is `train` itself on the demo's network and emoji images, all patches from the first
step unless it masks them. Its learning rate is found by the same small search, on a seed and with a
part of the steps that the race does not use. Then it trains from several seeds, as many steps as
cost the first candidate's operations (models/flops.py, forward and backward). What the optimiser
computes itself is told apart, and counts in the plot.

A result is written as soon as it is there, and the same command again goes on from there: --out has
results/*.json, one for each run, table.md and loss.png.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("benchmarks.race")

from pathlib import Path

from absl import flags

from benchmarks.race_count import table
from benchmarks.race_runs import CANDIDATES, Settings, race
from configs import demo
from microdit_jax.commands.cli import absl_command
from microdit_jax.errors import UserError
from microdit_jax.files import check_writable

NAMES = flags.DEFINE_list("candidates", list(CANDIDATES), "Which; the first is the yardstick.")
STEPS = flags.DEFINE_integer("steps", 1400, "Steps of the first candidate.", lower_bound=5)
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each candidate.", lower_bound=2)
RATE = flags.DEFINE_float("rate", 3e-3, "Learning rate at which searches begin.")
SHARE = flags.DEFINE_float(
    "search_share", 0.5, "Steps of the search's runs, over --steps; 0: none."
)
IMAGES = flags.DEFINE_integer("score_images", 2000, "Samples scored at each run's end; 0: none.")
POINTS = flags.DEFINE_integer("evaluations", 4, "Points of a run's curve.", lower_bound=1)
DRAWS = flags.DEFINE_integer(
    "noise_samples", 8, "Noise samples of a held-out image.", lower_bound=1
)
COUNT = flags.DEFINE_bool("count", False, "Count operations of single steps, and train nothing.")
BATCH = flags.DEFINE_integer("batch_size", 64, "Images of a step.", lower_bound=1)
SIDE = flags.DEFINE_integer(
    "resolution", 32, "Pixels of an image's side; each wants --data of its own.", lower_bound=32
)
DATA = flags.DEFINE_string("data", "out/data/twemoji", "The prepared images, made if missing.")
OUT = flags.DEFINE_string("out", "out/race", "Folder for everything.")


@absl_command()
def main():
    names, out = NAMES.value, Path(OUT.value)
    if unknown := [name for name in names if name not in CANDIDATES]:
        raise UserError(f"--candidates takes {', '.join(CANDIDATES)}, found {', '.join(unknown)}")
    if SIDE.value % 32:
        raise UserError(f"--resolution takes multiples of 32, found {SIDE.value}")
    base = demo.get_config("finetune")
    base.train.batch_size = BATCH.value
    base.model.options.input_size *= SIDE.value // base.data.resolution
    base.data.resolution = SIDE.value
    if COUNT.value:
        return print(table(names, base))
    check_writable(out, folder=True)
    settings = Settings(DATA.value, POINTS.value, DRAWS.value, IMAGES.value)
    race(
        names, base, settings, out, steps=STEPS.value, seeds=SEEDS.value, rate=RATE.value,
        search_share=SHARE.value,
    )  # fmt: skip
    print((out / "table.md").read_text())
