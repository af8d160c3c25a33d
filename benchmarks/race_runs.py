"""The runs of a race (benchmarks/race.py): their configurations, search and results, no flags."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks import standings
from microdit_jax.encoders.registry import text_encoder
from microdit_jax.errors import UserError
from microdit_jax.files import read_json, write_bytes, write_json, write_text
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
