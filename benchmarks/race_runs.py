"""The runs of a race (benchmarks/race.py): their configurations, search and results, no flags."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from ml_collections import ConfigDict

from benchmarks import standings
from microdit_jax.diffusion import EdmConfig
from microdit_jax.encoders.registry import text_encoder
from microdit_jax.errors import UserError
from microdit_jax.files import read_json, write_bytes, write_json, write_text
from microdit_jax.models import flops
from microdit_jax.models.dit import abstract_params
from microdit_jax.train import train
from microdit_jax.training import muon
from microdit_jax.training.config import make_step, model_config, over_forward
from microdit_jax.training.evaluation import EVALUATORS, Entry
from microdit_jax.training.evaluators.base import EvaluationContext
from microdit_jax.training.evaluators.heldout_loss import HeldoutLossEvaluator
from microdit_jax.training.evaluators.samples import SampleScores
from microdit_jax.training.metric_writer import read_metrics
from microdit_jax.training.step import TrainState

SEARCH_SEED, FIRST_SEED = 1000, 18
SEARCH_MOVES = 3  # in one direction


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a candidate's training; the state goes from one stage to the next.

    Attributes:
      share: of the operations that a run has.
      values: of the configuration, by path.
    """

    share: float = 1.0
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Changes to the race's configuration, and the stages of its training.

    Attributes:
      values: of the configuration, by path.
      stages: its training's parts, whose shares sum to 1, or to less for a shorter run.
      rate: learning rate over the one that searches begin at, or that stands in for a search.
      linear: share of the steps in which the rate falls in a straight line; 0 for the cosine.
      against: the candidate that it is compared with, where that one runs too.
    """

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stages: Sequence[Stage] = (Stage(),)
    rate: float = 1.0
    linear: float = 0.0
    against: str = ""


MASKED = {"train.mask_ratio": 0.75}
ROUTED = {"model.options.unmasked_blocks": 1}
UNCERTAIN = {"loss.learned_uncertainty": True}
MUON = {"optim.name": "muon"}

# The first one's steps set how many operations all have.
CANDIDATES: dict[str, Candidate] = {
    "adamw": Candidate(),
    "wsd": Candidate(linear=0.2),
    "uncertainty": Candidate(UNCERTAIN),
    "masked": Candidate(MASKED),
    "routed": Candidate(MASKED | ROUTED, against="masked"),
    "masked_tuned": Candidate(stages=(Stage(0.75, MASKED), Stage(0.25))),
    "routed_tuned": Candidate(
        ROUTED, stages=(Stage(0.75, MASKED), Stage(0.25)), against="masked_tuned"
    ),
    # Mean and deviation of ln sigma where AdamW's short race had lowered the loss, by how much.
    "noise": Candidate({"edm.P_mean": -0.34, "edm.P_std": 1.29}),
    # Its search ended at twice AdamW's rate.
    "muon": Candidate(MUON, rate=2.0),
    # All that won without a mask, and the same in half the operations.
    "best": Candidate(MUON | UNCERTAIN, rate=2.0, linear=0.2),
    "best_half": Candidate(MUON | UNCERTAIN, stages=(Stage(0.5),), rate=2.0, linear=0.2),
    # The combination without the loss that is learned.
    "muon_wsd": Candidate(MUON, rate=2.0, linear=0.2),
    "muon_wsd_half": Candidate(MUON, stages=(Stage(0.5),), rate=2.0, linear=0.2),
    # All that won, with the paper's mask.
    "best_masked": Candidate(MASKED | ROUTED | MUON, rate=2.0, linear=0.2, against="masked"),
}


class Curve(HeldoutLossEvaluator):
    """The held-out loss, but not before the first step, where all are alike."""

    at_start = False

    def __init__(self, context: EvaluationContext):
        # The recipe's noise levels, whatever levels a candidate trains at.
        super().__init__(dataclasses.replace(context, edm=EdmConfig()))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all runs of a race share, beside their configuration.

    Attributes:
      data: folder of the prepared images.
      evaluations: points of a run's curve.
      noise_samples: for each held-out image.
      score_images: samples scored at a run's end; 0 for none.
    """

    data: str
    evaluations: int = 4
    noise_samples: int = 8
    score_images: int = 0


class FinalScores(SampleScores):
    """The sampled images' scores, of a run's last step alone."""

    def run(self, step: int, state: TrainState) -> None:
        """Scores the weights if this is the last step."""
        if step == self._context.config.train.steps:
            super().run(step, state)


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One run: a candidate with a learning rate, a seed and the steps of each of its stages."""

    candidate: str
    rate: float
    seed: int
    parts: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(self.parts)

    @property
    def name(self) -> str:
        parts = "+".join(map(str, self.parts))
        return f"{self.candidate}_{self.rate:.3g}_{parts}_{self.seed}"


# ------------------------------------------------------------------ one run
def run_configs(entrant: Entrant, base: ConfigDict, settings: Settings) -> list[ConfigDict]:
    """Returns the configuration of each stage of a run: `base` with the candidate's values."""
    candidate, configs, done = CANDIDATES[entrant.candidate], [], 0
    every = max(1, entrant.steps // settings.evaluations)
    for stage, steps in zip(candidate.stages, entrant.parts, strict=True):
        done += steps
        config = base.copy_and_resolve_references()
        config.init_from, config.seed = "", entrant.seed
        data = settings.data
        config.data.datasets = ({"source": "twemoji", "folder": data, "weight": 1.0},)
        config.data.heldout.folder = data
        warmup = max(1, entrant.steps // 14)  # the demo's share
        config.optim.update(
            learning_rate=entrant.rate, warmup_steps=warmup, decay_steps=entrant.steps,
            linear_steps=round(candidate.linear * entrant.steps),
        )  # fmt: skip
        # An average's length would be a choice of its own; the rate ends near 0.
        config.ema.enabled = False
        config.train.update(
            steps=done, mask_ratio=0.0, log_every=max(1, every // 2), eval_every=every,
            checkpoint_every=every,
        )  # fmt: skip
        config.eval.update(
            evaluators=("race_loss", "final_scores"), draws=settings.noise_samples,
            score_images=settings.score_images if done == entrant.steps else 0,
            num_inference_steps=10,
        )  # fmt: skip
        config.log.tensorboard = False
        for values in (candidate.values, stage.values):
            for name, value in values.items():
                config.update_from_flattened_dict({name: value})
        configs.append(config)
    return configs


def operations(config: ConfigDict) -> tuple[int, int]:
    """Returns the operations of a step: the network's, forward and backward, and the optimiser's.

    Sums over elements, such as AdamW's, are not counted, as nowhere in models/flops.py.
    """
    cfg, run = model_config(config), config.train
    tokens = text_encoder(config.data.text_encoder).max_tokens
    forward = flops.forward_flops(cfg, run.mask_ratio, tokens)
    own = muon.update_flops(abstract_params(cfg)) if config.optim.name == "muon" else 0
    return over_forward(config) * forward * run.batch_size, own


def one_noise(config: ConfigDict, *arguments: Any) -> Any:
    """Returns the training step with the noise of one seed, so that all compile to one program.

    Seeds still differ in the first weights and in the images of each step.
    """
    config = config.copy_and_resolve_references()
    config.seed = FIRST_SEED
    return make_step(config, *arguments)


def measure(entrant: Entrant, configs: Sequence[ConfigDict], out: Path) -> dict[str, Any]:
    """Trains all stages, unless the result is there already, and writes the result."""
    path = out / "results" / f"{entrant.name}.json"
    if path.is_file():
        return read_json(path)
    EVALUATORS["final_scores"] = Entry(FinalScores, switch="score_images")
    EVALUATORS["race_loss"] = Entry(Curve)
    begin = time.monotonic()
    curve, scores, seconds, network, own, done = [], {}, [], 0, 0, 0
    workdir = None
    for i, config in enumerate(configs):
        if workdir is not None:
            config.init_from = str(workdir)
        workdir = out / "runs" / entrant.name / str(i)
        with mock.patch("microdit_jax.train.make_step", one_noise):
            if int(train(config, workdir).step) < config.train.steps:
                raise UserError(f"{workdir} was stopped; the same command goes on")
        of_network, of_optimizer = operations(config)
        for line in read_metrics(workdir):
            if "heldout" in line:
                steps = line["step"] - done
                point = {
                    "network_flops": network + steps * of_network,
                    "optimizer_flops": own + steps * of_optimizer,
                }
                curve.append({"step": line["step"], **point, **line["heldout"]["raw"]})
            scores = line.get("samples", scores)
            if "speed" in line:
                seconds.append(line["speed"]["seconds_per_step"])
        network += (config.train.steps - done) * of_network
        own += (config.train.steps - done) * of_optimizer
        done = config.train.steps
    result = {
        **dataclasses.asdict(entrant),
        "seconds_per_step": float(np.median(seconds)),
        "seconds": time.monotonic() - begin,
        "curve": curve,
        "scores": scores,
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
    names: Sequence[str], base: ConfigDict, settings: Settings, out: Path, *, steps: int,
    seeds: int, rate: float, search_share: float,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Runs what has no result yet, and returns all results of each candidate's seeds.

    After each run of a seed, the table and the plot are written anew.
    """

    def result(entrant: Entrant, settings: Settings) -> dict[str, Any]:
        return measure(entrant, run_configs(entrant, base, settings), out)

    def step_flops(name: str) -> list[int]:
        entrant = Entrant(name, rate, 0, (2,) * len(CANDIDATES[name].stages))
        configs = run_configs(entrant, base, settings)
        return [operations(config)[0] for config in configs]

    whole = steps * step_flops(names[0])[0]

    def entrant(name: str, rate: float, seed: int, share: float = 1.0) -> Entrant:
        """Returns the run that has this share of the first candidate's operations."""
        stages = zip(CANDIDATES[name].stages, step_flops(name), strict=True)
        parts = [max(1, round(share * stage.share * whole / flops)) for stage, flops in stages]
        return Entrant(name, rate, seed, tuple(parts))

    def search(name: str) -> float:
        """Finds a candidate's learning rate; without a search it is the one that it begins at."""

        def loss(rate: float) -> float:
            run = entrant(name, rate, SEARCH_SEED, search_share)
            return final_loss(result(run, dataclasses.replace(settings, score_images=0)))

        begin = rate * CANDIDATES[name].rate
        return tuned(loss, begin) if search_share else begin

    rates = {name: search(name) for name in names}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rivals = {name: CANDIDATES[name].against or names[0] for name in names}
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for name in names:
            found[name].append(result(entrant(name, rates[name], seed), settings))
            done = {name: results for name, results in found.items() if results}
            write_text(out / "table.md", standings.table(done, rivals))
            write_bytes(out / "loss.png", standings.plot(done))
    return found
