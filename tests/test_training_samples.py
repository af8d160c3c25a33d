"""Samples at evaluations of a run: a grid, scores, and what happens where there are none."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from PIL import Image
from support.evaluation import PROMPTS, make_pipe, references

from configs import demo
from microdit_jax import sharding
from microdit_jax.checkpoints.run import write_run_metadata
from microdit_jax.data.latents import LatentSource
from microdit_jax.images import to_uint8
from microdit_jax.metrics.features import small_features
from microdit_jax.metrics.frechet import Statistics, frechet_distance
from microdit_jax.metrics.statistics import load_reference
from microdit_jax.training.data import RunData
from microdit_jax.training.evaluation import EVALUATORS, make_evaluators
from microdit_jax.training.evaluators.base import EvaluationContext
from microdit_jax.training.evaluators.samples import Scorer
from microdit_jax.training.metric_writer import MetricWriter, read_metrics
from microdit_jax.training.step import TrainState


def make_context(tmp_path, **settings):
    """A run of the tiny pipeline with two held-out images, and what it has said."""
    pipe, config, said = make_pipe(), demo.get_config("pretrain"), []
    config.data.text_encoder = pipe.text_encoder.name
    config.eval.update(num_samples=0, num_images=2, batch_size=8, num_inference_steps=2, **settings)
    pipe.codec.save(tmp_path / "codec")
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    heldout = LatentSource(
        latents, np.zeros((2, 6, 24), np.float32), ("a cat", "a dog"), vae="v", text_encoder="t"
    )
    data = RunData([], [], [], heldout, {}, None, tmp_path / "codec", "CC-BY by us")
    write_run_metadata(tmp_path, {"config": config.to_dict()})
    writer = MetricWriter(tmp_path, restored_step=None, tensorboard=False)
    context = EvaluationContext(
        config, tmp_path, pipe.model, pipe.edm, sharding.make_mesh(), data, writer, said.append
    )
    return context, said


@pytest.fixture(autouse=True)
def close_writers(monkeypatch):
    """Closes the writers that a test's contexts opened."""
    made = []
    init = MetricWriter.__init__

    def remembered(self, *args, **options):
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(MetricWriter, "__init__", remembered)
    yield
    for writer in made:
        writer.close()


def state_of(params, ema=None):
    return TrainState(step=5, params=params, opt_state=(), ema=ema, skipped=0)


def scaled(factor):
    return jax.tree.map(lambda p: factor * p, make_pipe().params)


def test_the_list_is_the_configs(tmp_path):
    context, _ = make_context(tmp_path)
    kinds = {name: entry.make for name, entry in EVALUATORS.items()}
    made = make_evaluators(context)
    assert [type(e) for e in made] == [kinds["heldout_loss"], kinds["page"]]  # counts are 0
    assert [e.at_start for e in made] == [True, False]
    context.config.eval.evaluators = ("page",)
    assert [type(e) for e in make_evaluators(context)] == [kinds["page"]]
    assert context.config.eval.num_samples == 0
    context.config.eval.update(num_samples=2, evaluators=("sample_grid", "page"))
    assert [type(e) for e in make_evaluators(context)] == [kinds["sample_grid"], kinds["page"]]


def test_one_added_to_the_table_is_run(tmp_path, monkeypatch):
    from microdit_jax.training.evaluation import Entry

    monkeypatch.setitem(
        EVALUATORS, "mine", Entry(lambda context: types.SimpleNamespace(at_start=False, run=max))
    )
    context, _ = make_context(tmp_path, evaluators=("mine",))
    (mine,) = make_evaluators(context)
    assert mine.run(1, 2) == 2


def test_heldout_losses_of_both_kinds_of_weights(tmp_path):
    context, said = make_context(tmp_path, evaluators=("heldout_loss",))
    (losses,) = make_evaluators(context)
    raw, ema = make_pipe().params, scaled(1.5)
    losses.run(5, state_of(raw, ema=ema))
    losses.run(6, state_of(raw))
    losses.run(7, state_of(ema))
    both, first, second = (line["heldout"] for line in read_metrics(tmp_path))
    assert both == {"raw": first["raw"], "ema": second["raw"]} and first != second
    assert [line.split(" held-out loss of the ")[1].split()[0] for line in said] == [
        "raw", "ema", "raw", "raw",
    ]  # fmt: skip


def test_samples_are_scored_at_evaluations(tmp_path):
    context, said = make_context(
        tmp_path, score_images=6, score_reference=str(references(tmp_path)),
        evaluators=("sample_scores",),
    )  # fmt: skip
    (scores,) = make_evaluators(context)
    scores.run(5, state_of(make_pipe().params))
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 5 and line["samples"]["frechet_small"] > 0
    value = line["samples"]["frechet_small"]
    assert said == [f"step 5: samples against real images: frechet_small {value:.4g}"]
    # The moving average is what is sampled, where one is kept.
    scores.run(6, state_of(make_pipe().params, ema=scaled(1.5)))
    scores.run(7, state_of(scaled(1.5)))
    first, second, third = (line["samples"]["frechet_small"] for line in read_metrics(tmp_path))
    assert second == third != first


def test_scores_are_those_of_the_whole_evaluation(tmp_path):
    pipe = make_pipe()
    options = {"guidance_scale": 3.0, "num_inference_steps": 2, "batch_size": 4, "seed": 0}
    scorer = Scorer(str(references(tmp_path)), tmp_path, resolution=32)
    found = scorer(pipe, pipe.generate(PROMPTS.texts, return_only_latents=True, **options))
    images = pipe.generate(PROMPTS.texts, **options)
    features = small_features()(list(to_uint8(images)))
    (npz,) = tmp_path.glob("reference_*.npz")
    expected = frechet_distance(Statistics.of(features), load_reference(npz).statistics)
    assert found == {"frechet_small": pytest.approx(expected, rel=1e-5)}


def test_a_grid_of_the_prompts_or_of_heldout_captions(tmp_path):
    context, _ = make_context(tmp_path, evaluators=("sample_grid",))
    context.config.eval.num_samples = 2
    (beside,) = make_evaluators(context)
    beside.run(5, state_of(make_pipe().params))
    path = tmp_path / "samples" / "step_0000005.png"
    with Image.open(path) as image:
        assert "CC-BY by us" in image.text["microdit_jax"]
        pairs = image.width
    context.config.eval.prompts = ("a cat", "a dog", "a hen")
    (alone,) = make_evaluators(context)
    alone.run(5, state_of(make_pipe().params))
    with Image.open(path) as image:
        assert image.width < pairs  # two samples, without the real images
    # By hand: the first sample of the grid, enlarged threefold.
    expected = make_pipe().generate(
        ["a cat", "a dog"], seed=context.config.seed, num_inference_steps=2,
        guidance_scale=context.config.eval.guidance_scale,
    )  # fmt: skip
    grid = alone.sample(make_pipe().params)
    np.testing.assert_allclose(grid[6:102:3, 6:102:3], expected[0], atol=0.6 / 255)


def test_samples_that_cannot_be_made_end_nothing(tmp_path):
    context, said = make_context(
        tmp_path, score_images=6, score_reference=str(references(tmp_path)),
        evaluators=("sample_scores", "sample_grid"),
    )  # fmt: skip
    context.config.eval.num_samples = 2
    broken = state_of(jax.tree.map(lambda p: p * np.float32("nan"), make_pipe().params))
    for evaluator in make_evaluators(context):
        evaluator.run(5, broken)
    assert len(said) == 2 and all("step 5: no samples: expected finite" in line for line in said)
    assert not (tmp_path / "samples").exists() and read_metrics(tmp_path) == []


def test_only_one_process_needs_the_decoder(tmp_path, monkeypatch):
    context, _ = make_context(tmp_path)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    other = dataclasses.replace(context, writer=None)
    assert context.pipe.codec is None and other.pipe.codec is None
