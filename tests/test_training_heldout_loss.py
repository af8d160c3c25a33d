"""The held-out loss: means over images and noise samples, the same at every evaluation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from microdit_jax import sharding
from microdit_jax.diffusion import EdmConfig
from microdit_jax.training import step as train_step
from microdit_jax.training.evaluators import heldout_loss as heldout_module
from microdit_jax.training.evaluators.heldout_loss import HeldoutLoss, nearest_level, sigma_levels

EDM = EdmConfig(P_mean=-0.3, P_std=0.8, sigma_data=0.7)


def test_noise_levels():
    levels = sigma_levels(EDM)
    assert levels[4] == pytest.approx(np.exp(EDM.P_mean))
    between = jnp.asarray(levels) * np.exp(0.24 * EDM.P_std)
    np.testing.assert_array_equal(nearest_level(between, EDM), range(9))
    np.testing.assert_array_equal(nearest_level(jnp.array([1e-9, 1e9]), EDM), [0, 8])


class Images:
    """A few of them, each with a caption of its own."""

    def __init__(self, count):
        rng, cfg = np.random.default_rng(0), tiny_model().config
        self._latents = rng.normal(size=(count, cfg.input_size, cfg.input_size, cfg.in_channels))
        self._captions = rng.normal(size=(count, 3, cfg.caption_channels))

    def __len__(self):
        return len(self._latents)

    def __getitem__(self, i):
        return {
            "latents": self._latents[i].astype(np.float32),
            "caption_latents": self._captions[i].astype(np.float32),
        }

    def batch(self, rows, shift=0):
        others = [self[(i + shift) % len(self)] for i in rows]
        return {
            "latents": np.stack([self[i]["latents"] for i in rows]),
            "caption_latents": np.stack([record["caption_latents"] for record in others]),
        }


def heldout_loss(images, **options):
    options = {"num_images": 100, "batch_size": 8, "noise_samples": 2} | options
    return HeldoutLoss(tiny_model(), EDM, sharding.make_mesh(), images, **options)


def formula(params, batch):
    """In place of a network's loss, of everything that the loss may depend on; and a sigma."""
    draw, latents = batch["draw"].astype(np.float32) + 1, jnp.mean(batch["latents"], (1, 2, 3))
    loss = latents + params * jnp.sum(batch["caption_latents"], (1, 2))
    return loss**2 * draw, jnp.exp(3 * latents * draw)


@pytest.mark.parametrize("count", [7, 19])  # one batch of eight, filled up; three of them
def test_means_over_images_and_noise_samples_alone(monkeypatch, count):
    """On eight devices; what fills a batch up does not count."""
    monkeypatch.setattr(train_step, "make_eval_step", lambda *args, **kwargs: formula)
    images, params = Images(count), jnp.float32(0.3)
    found = heldout_loss(images)(params)

    def results(shift):
        """Losses and sigmas of all images, each batch with noise samples of its own."""
        parts = []
        for number, start in enumerate(range(0, count, 8)):
            batch = images.batch(range(start, min(start + 8, count)), shift)
            for i in range(2):
                parts.append(formula(params, batch | {"draw": np.uint32(2 * number + i)}))
        return (np.concatenate([part[i] for part in parts]) for i in range(2))

    losses, sigma = results(0)
    assert found["right"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["shuffled"] == pytest.approx(next(results(count // 2)).mean(), rel=1e-5)
    assert found["ratio"] == found["right"] / found["shuffled"] != 1
    level = np.argmin(np.abs(np.log(sigma[:, None] / sigma_levels(EDM))), axis=1)
    assert 1 < len(set(level)) < 9  # some levels have noise samples and some have none
    for i, (name, value) in enumerate(found["by_sigma"].items()):
        assert float(name) == pytest.approx(sigma_levels(EDM)[i], rel=1e-2)
        expected = losses[level == i].mean() if np.any(level == i) else np.nan
        assert value == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_every_noise_sample_is_another_and_every_evaluation_the_same():
    """With the real loss: more noise samples are other noise, and a second call repeats all."""
    model, images = tiny_model(), Images(8)
    x = jnp.zeros((1, 8, 8, 4))
    params = model.init(jax.random.key(0), x, jnp.zeros(1), jnp.zeros((1, 1, 24)))["params"]
    one, two = heldout_loss(images, noise_samples=1), heldout_loss(images, noise_samples=2)
    first, both = one(params), two(params)
    assert json.dumps(one(params)) == json.dumps(first)  # some levels are NaN
    # Had both samples the same noise, their mean would be the first one's loss.
    assert abs(both["right"] / first["right"] - 1) > 1e-3


def test_the_noise_is_the_same_in_every_run(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        train_step, "make_eval_step", lambda *args, seed, **kwargs: seeds.append(seed) or formula
    )
    for _ in range(2):
        heldout_loss(Images(7))
    assert seeds == [0x4E1D, 0x4E1D]  # what all losses of earlier runs were measured with


def test_images_are_spread_over_the_whole_source(monkeypatch):
    monkeypatch.setattr(train_step, "make_eval_step", lambda *args, **kwargs: formula)
    images = Images(17)
    found = heldout_loss(images, num_images=3, noise_samples=1)(jnp.float32(0.3))
    batch = images.batch([0, 8, 16]) | {"draw": np.uint32(0)}
    losses, _ = formula(0.3, batch)
    assert found["right"] == pytest.approx(np.mean(np.asarray(losses)), rel=1e-5)


def test_a_stop_waits_for_few_programs(monkeypatch):
    """Devices are never far behind, and each noise sample asks whether the run stops."""
    monkeypatch.setattr(train_step, "make_eval_step", lambda *args, **kwargs: formula)
    running, most, asked = 0, 0, 0

    class Result(np.ndarray):
        def block_until_ready(self):
            nonlocal running
            running -= 1

    def check():
        nonlocal asked
        asked += 1

    measure = heldout_loss(Images(16), noise_samples=10, check=check)
    compiled = measure._weighted_sums

    def dispatched(*args):
        nonlocal running, most
        running += 1
        most = max(most, running)
        return np.asarray(compiled(*args)).view(Result)

    monkeypatch.setattr(measure, "_weighted_sums", dispatched)
    measure(jnp.float32(0.3))
    assert (most, asked) == (heldout_module.AHEAD + 1, 2 * 10)
