"""The race: its search, its figures by hand, what is measured twice, and one small run of it."""

import dataclasses

import numpy as np
import pytest
from test_train import tiny_config

from benchmarks import race_runs, standings
from benchmarks.race_runs import Candidate, Stage
from configs import demo
from microdit_jax.diffusion import EdmConfig
from microdit_jax.models import flops
from microdit_jax.training.config import model_config
from microdit_jax.training.evaluators.heldout_loss import sigma_levels

SETTINGS = race_runs.Settings("data", score_images=4)


def fake_result(entrant, losses, *, own=0, score=0.5):
    """A result as `race_runs.measure` writes it; a step costs 100 + own operations."""
    levels = {"0.5": 0.1, "1": None}
    curve = [
        {
            "step": step, "network_flops": 100 * step, "optimizer_flops": own * step,
            "right": loss, "shuffled": 1.0, "ratio": loss, "by_sigma": levels,
        }
        for step, loss in zip((0, 10, 20), losses, strict=True)
    ]  # fmt: skip
    return {
        **dataclasses.asdict(entrant), "seconds_per_step": 0.3, "seconds": 9.0, "curve": curve,
        "scores": {"frechet_small": score},
    }  # fmt: skip


@pytest.mark.parametrize(("best", "found"), [(1.0, 1.0), (4.1, 4.0), (0.24, 0.25), (1e6, 8.0)])
def test_the_search_doubles_or_halves_while_that_helps(best, found):
    tried = []

    def loss_of(rate):
        tried.append(rate)
        return abs(np.log(rate / best))

    assert race_runs.tuned(loss_of, 1.0) == found
    assert len(tried) == len(set(tried)) <= 2 + race_runs.SEARCH_MOVES


def test_an_interval_by_hand():
    found = standings.Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    low, close = standings.Interval(0.5, 0.1), standings.Interval(0.65, 0.1)
    high = standings.Interval(0.8, 0.1)
    assert low.against(standings.Interval.of([0.9])) == "one seed"
    assert (low.against(close), low.against(high), high.against(low)) == (
        "no difference", "lower", "higher",
    )  # fmt: skip


def test_operations_until_a_loss_is_reached():
    entrant = race_runs.Entrant("muon", 1e-3, 0, (20,))
    results = [fake_result(entrant, losses, own=50) for losses in ((1.0, 0.6, 0.2), (1.0, 0.4, 0))]
    assert standings.reached(results, 0.75) == pytest.approx(150 * 5)  # means are 1, 0.5 and 0.1
    assert standings.reached(results, 0.3) == pytest.approx(150 * 15)
    assert standings.reached(results, 0.3, own=False) == pytest.approx(100 * 15)
    assert standings.reached(results, 0.05) is None


def test_differences_are_those_of_one_seed():
    runs = [
        [
            fake_result(race_runs.Entrant("adamw", 1e-3, seed, (20,)), (1.0, 0.9, loss + more))
            for seed, loss in enumerate((0.5, 0.9, 0.1))
        ]
        for more in (0.01, 0.0)
    ]
    found = standings.paired(runs[0], runs[1][::-1])
    assert found.mean == pytest.approx(0.01) and found.half < 1e-6


@pytest.mark.parametrize("name", ["adamw", "muon", "best"])
def test_operations_of_a_step(name):
    entrant = race_runs.Entrant(name, 1e-3, 0, (20,))
    (config,) = race_runs.run_configs(entrant, demo.get_config("finetune"), SETTINGS)
    network, own = race_runs.operations(config)
    assert network == 64 * flops.train_flops(model_config(config), 0.0, 16)
    assert (own > 0) == (name != "adamw")
    assert config.loss.learned_uncertainty == (name == "best")
    assert config.optim.name == ("adamw" if name == "adamw" else "muon")
    assert config.init_from == "" and config.optim.decay_steps == 20


def test_stages_go_on_with_one_schedule():
    entrant = race_runs.Entrant("routed_tuned", 1e-3, 7, (20, 10))
    configs = race_runs.run_configs(entrant, demo.get_config("finetune"), SETTINGS)
    assert [config.train.steps for config in configs] == [20, 30]
    assert [config.train.mask_ratio for config in configs] == [0.75, 0.0]
    assert {config.optim.decay_steps for config in configs} == {30}
    assert {model_config(config).unmasked_blocks for config in configs} == {1}
    assert entrant.name == "routed_tuned_0.001_20+10_7"


def test_a_race_from_search_to_table(monkeypatch, tmp_path):
    """With a made-up loss: each rate is searched apart, all seeds run, the table says who won."""
    seen = []

    def measure(entrant, configs, out):
        seen.append(entrant)
        best = {"adamw": 4e-3, "muon": 2e-3}[entrant.candidate]
        loss = {"adamw": 0.6, "muon": 0.3}[entrant.candidate]
        loss += abs(np.log(entrant.rate / best)) + 0.001 * (entrant.seed % 3)
        return fake_result(entrant, (1.0, 0.9, loss), own=50 * (entrant.candidate == "muon"))

    monkeypatch.setattr(race_runs, "measure", measure)
    base = demo.get_config("finetune")
    candidates = {"adamw": Candidate(), "muon": Candidate({"optim.name": "muon"})}
    monkeypatch.setattr(race_runs, "CANDIDATES", candidates)
    lengths = {"steps": 20, "seeds": 3, "rate": 2e-3, "search_share": 0.5}
    found = race_runs.race(["adamw", "muon"], base, SETTINGS, tmp_path, **lengths)
    finals = [entrant for entrant in seen if entrant.seed != race_runs.SEARCH_SEED]
    assert {(e.candidate, e.rate, e.steps) for e in finals} == {
        ("adamw", 4e-3, 20), ("muon", 2e-3, 20)
    }  # fmt: skip
    assert all(e.steps == 10 for e in seen if e.seed == race_runs.SEARCH_SEED)
    assert {e.seed for e in finals} == {18, 19, 20} and len(found["muon"]) == 3
    table = (tmp_path / "table.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| muon | 3 |"))
    assert "| lower: adamw | -0.3 ± " in row and "| +50% |" in row and "0.301 ± 0.0025" in row
    assert (
        "| 1.12x | 0.75x |" in row
    )  # 15 of 20 steps, of 150 operations each where others take 100
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_is_measured_once(monkeypatch, tmp_path):
    base = tiny_config(tmp_path, "finetune")
    base.model.options.update(depth=1, patch_mixer_depth=1)
    base.train.batch_size = 16
    entrant = race_runs.Entrant("muon", 1e-2, 1, (1, 1))
    stages = (Stage(0.5, {"train.batch_size": 8}), Stage(0.5))
    candidate = Candidate({"optim.name": "muon", "edm.P_mean": 0.5}, stages)
    monkeypatch.setitem(race_runs.CANDIDATES, "muon", candidate)
    settings = race_runs.Settings(str(tmp_path / "data"), evaluations=2, noise_samples=1)
    configs = race_runs.run_configs(entrant, base, settings)
    result = race_runs.measure(entrant, configs, tmp_path)
    assert [point["step"] for point in result["curve"]] == [1, 2]
    first, last = (point["network_flops"] for point in result["curve"])
    assert last == 3 * first  # the second step has twice the images
    # Noise levels that it trains at are its own, those that it is measured at are everyone's.
    levels = {f"{sigma:.3g}" for sigma in sigma_levels(EdmConfig())}
    assert set(result["curve"][-1]["by_sigma"]) == levels
    assert 0 < race_runs.final_loss(result) < 3 and result["curve"][-1]["optimizer_flops"] > 0

    def train(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(race_runs, "train", train)
    again = race_runs.measure(entrant, configs, tmp_path)
    assert again == result | {"parts": [1, 1]}
