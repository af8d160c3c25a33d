"""A race: ideas against the recipe, on the same data with the same operations of the network.

  python -m benchmarks.race --steps=1400 --out=out/race                        # hours on two cores
  python -m benchmarks.race --candidates=adamw,muon --steps=300 --out=out/short

Each candidate is `train` itself on the demo's network and emoji images, all patches from the first
step. Its learning rate is found by the same small search, on a seed and with a part of the steps
that the race does not use. Then it trains from several seeds, as many steps as cost the first
candidate's operations (models/flops.py, forward and backward). What the optimiser computes itself
is told apart, and counts in the plot.

A result is written as soon as it is there, and the same command again goes on from there: --out has
results/*.json, one for each run, table.md and loss.png.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("benchmarks.race")

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import standings
from configs import demo
from microdit_jax.commands.cli import absl_command
from microdit_jax.encoders.registry import text_encoder
from microdit_jax.errors import UserError
from microdit_jax.files import check_writable, read_json, write_bytes, write_json, write_text
from microdit_jax.models import flops
from microdit_jax.models.dit import abstract_params
from microdit_jax.train import train
from microdit_jax.training import muon
from microdit_jax.training.config import model_config, over_forward
from microdit_jax.training.evaluation import EVALUATORS, Entry
from microdit_jax.training.evaluators.samples import SampleScores
from microdit_jax.training.metric_writer import read_metrics
from microdit_jax.training.step import TrainState

# Values of a candidate's configuration; the first one's steps set how many operations all have.
CANDIDATES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optim.name": "muon"},
}

NAMES = flags.DEFINE_list("candidates", list(CANDIDATES), "Which; the first is the yardstick.")
STEPS = flags.DEFINE_integer("steps", 1400, "Steps of the first candidate.", lower_bound=5)
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each candidate.", lower_bound=2)
RATE = flags.DEFINE_float("rate", 3e-3, "Learning rate at which searches begin.")
SHARE = flags.DEFINE_float(
    "search_share", 0.5, "Steps of the search's runs, over --steps; 0: none."
)
IMAGES = flags.DEFINE_integer("score_images", 2000, "Samples scored at each run's end; 0: none.")
BATCH = flags.DEFINE_integer("batch_size", 64, "Images of a step.", lower_bound=1)
DATA = flags.DEFINE_string("data", "out/data/twemoji", "The prepared images, made if missing.")
OUT = flags.DEFINE_string("out", "out/race", "Folder for everything.")

SEARCH_SEED, FIRST_SEED = 1000, 18
SEARCH_MOVES = 3  # in one direction
EVALUATIONS = 4  # of a run: points of its curve


class FinalScores(SampleScores):
    """The sampled images' scores, of a run's last step alone."""

    def run(self, step: int, state: TrainState) -> None:
        """Scores the weights if this is the last step."""
        if step == self._context.config.train.steps:
            super().run(step, state)


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One run: a candidate with a learning rate, a seed and a number of steps."""

    candidate: str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.candidate}_{self.rate:.3g}_{self.steps}_{self.seed}"


# ------------------------------------------------------------------ one run
def run_config(entrant: Entrant, base: ConfigDict, data: str, *, score_images: int) -> ConfigDict:
    """Returns the configuration of a run: `base` with the candidate's values and its own steps."""
    config = base.copy_and_resolve_references()
    for name, value in CANDIDATES[entrant.candidate].items():
        config.update_from_flattened_dict({name: value})
    config.init_from, config.seed = "", entrant.seed
    config.data.datasets = ({"source": "twemoji", "folder": data, "weight": 1.0},)
    config.data.heldout.folder = data
    warmup = max(1, entrant.steps // 14)  # the demo's share
    config.optim.update(learning_rate=entrant.rate, warmup_steps=warmup, decay_steps=entrant.steps)
    config.ema.enabled = False  # its length would be a choice of its own; the rate ends near 0
    every = max(1, entrant.steps // EVALUATIONS)
    config.train.update(
        steps=entrant.steps, mask_ratio=0.0, log_every=max(1, every // 2), eval_every=every,
        checkpoint_every=every,
    )  # fmt: skip
    config.eval.update(
        evaluators=("heldout_loss", "final_scores"), score_images=score_images,
        num_inference_steps=10,
    )  # fmt: skip
    config.log.tensorboard = False
    return config


def operations(config: ConfigDict) -> tuple[int, int]:
    """Returns the operations of a step: the network's, forward and backward, and the optimiser's.

    Sums over elements, such as AdamW's, are not counted, as nowhere in models/flops.py.
    """
    cfg, run = model_config(config), config.train
    tokens = text_encoder(config.data.text_encoder).max_tokens
    network = over_forward(config) * flops.forward_flops(cfg, run.mask_ratio, tokens)
    own = muon.update_flops(abstract_params(cfg)) if config.optim.name == "muon" else 0
    return network * run.batch_size, own


def measure(entrant: Entrant, config: ConfigDict, out: Path) -> dict[str, Any]:
    """Trains, unless its result is there already, and writes the result."""
    path = out / "results" / f"{entrant.name}.json"
    if path.is_file():
        return read_json(path)
    EVALUATORS["final_scores"] = Entry(FinalScores, switch="score_images")
    workdir, begin = out / "runs" / entrant.name, time.monotonic()
    if int(train(config, workdir).step) < entrant.steps:
        raise UserError(f"{workdir} was stopped; the same command goes on")
    lines = read_metrics(workdir)
    network, own = operations(config)
    curve = [{"step": x["step"], **x["heldout"]["raw"]} for x in lines if "heldout" in x]
    scores = [line["samples"] for line in lines if "samples" in line]
    seconds = [line["speed"]["seconds_per_step"] for line in lines if "speed" in line]
    result = {
        **dataclasses.asdict(entrant),
        "network_flops_per_step": network,
        "optimizer_flops_per_step": own,
        "seconds_per_step": float(np.median(seconds)),
        "seconds": time.monotonic() - begin,
        "curve": curve,
        "scores": scores[-1] if scores else {},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def final_loss(result: Mapping[str, Any]) -> float:
    """Returns the held-out loss at the end, infinite where it is none."""
    loss = result["curve"][-1]["right"]
    return math.inf if loss is None or not math.isfinite(loss) else loss


def tuned(loss_of: Callable[[float], float], begin: float) -> float:
    """Returns the best learning rate: doubled while that helps, else halved while that helps."""
    best, least = begin, loss_of(begin)
    for factor in (2.0, 0.5):
        moved = False
        for _ in range(SEARCH_MOVES):
            if (loss := loss_of(best * factor)) >= least:
                break
            best, least, moved = best * factor, loss, True
        if moved:
            break
    return best


# ------------------------------------------------------------------ all of them
def race(
    names: Sequence[str], base: ConfigDict, data: str, out: Path, *, steps: int, seeds: int,
    rate: float, search_share: float, score_images: int,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Runs what has no result yet, and returns all results of each candidate's seeds.

    After each run of a seed, the table and the plot are written anew.
    """

    def result(entrant: Entrant, images: int) -> dict[str, Any]:
        config = run_config(entrant, base, data, score_images=images)
        return measure(entrant, config, out)

    def step_flops(name: str) -> int:
        return operations(run_config(Entrant(name, rate, 0, steps), base, data, score_images=0))[0]

    count = {name: round(steps * step_flops(names[0]) / step_flops(name)) for name in names}

    def search(name: str) -> float:
        """Finds a candidate's learning rate; without a search it is the one that all begin at."""
        part = round(search_share * count[name])

        def loss(rate: float) -> float:
            return final_loss(result(Entrant(name, rate, SEARCH_SEED, part), 0))

        return tuned(loss, rate) if part else rate

    rates = {name: search(name) for name in names}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for name in names:
            entrant = Entrant(name, rates[name], seed, count[name])
            found[name].append(result(entrant, score_images))
            done = {name: results for name, results in found.items() if results}
            write_text(out / "table.md", standings.table(done))
            write_bytes(out / "loss.png", standings.plot(done))
    return found


@absl_command()
def main():
    names, out = NAMES.value, Path(OUT.value)
    if unknown := [name for name in names if name not in CANDIDATES]:
        raise UserError(f"--candidates takes {', '.join(CANDIDATES)}, found {', '.join(unknown)}")
    check_writable(out, folder=True)
    base = demo.get_config("finetune")
    base.train.batch_size = BATCH.value
    race(
        names, base, DATA.value, out, steps=STEPS.value, seeds=SEEDS.value,
        rate=RATE.value, search_share=SHARE.value, score_images=IMAGES.value,
    )  # fmt: skip
    print((out / "table.md").read_text())
