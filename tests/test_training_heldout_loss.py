import jax.numpy as jnp
import numpy as np
import pytest
from support.one_of_each import CONFIG, EDM, mesh_of

from microdit_jax.models.dit import DiT
from microdit_jax.training import step as train_step
from microdit_jax.training.evaluators.heldout_loss import HeldoutLoss, nearest_level, sigma_levels


def test_levels_of_noise():
    levels = sigma_levels(EDM)
    assert levels[4] == pytest.approx(np.exp(EDM.P_mean))
    between = jnp.asarray(levels) * np.exp(0.24 * EDM.P_std)
    np.testing.assert_array_equal(nearest_level(between, EDM), range(9))
    np.testing.assert_array_equal(nearest_level(jnp.array([1e-9, 1e9]), EDM), [0, 8])


class Pictures:
    """Seven of them, each with a caption of its own."""

    def __init__(self):
        rng, cfg = np.random.default_rng(0), CONFIG
        self._latents = rng.normal(size=(7, cfg.input_size, cfg.input_size, cfg.in_channels))
        self._captions = rng.normal(size=(7, 3, cfg.caption_channels))

    def __len__(self):
        return 7

    def __getitem__(self, i):
        return {
            "latents": self._latents[i].astype(np.float32),
            "caption_latents": self._captions[i].astype(np.float32),
        }


def formula(params, batch):
    """In place of a network's loss, of everything that the loss may depend on; and a sigma."""
    draw, latents = batch["draw"].astype(np.float32) + 1, jnp.mean(batch["latents"], (1, 2, 3))
    loss = latents + params * jnp.sum(batch["caption_latents"], (1, 2))
    return loss**2 * draw, jnp.exp(3 * latents * draw)


def test_means_over_pictures_and_draws_alone(monkeypatch):
    """On eight devices: what fills a batch of seven up to eight does not count."""
    monkeypatch.setattr(train_step, "make_eval_step", lambda *args, **kwargs: formula)
    pictures, params = Pictures(), jnp.float32(0.3)
    heldout_loss = HeldoutLoss(
        DiT(CONFIG),
        EDM,
        mesh_of((8, 1, 1)),
        pictures,
        num_images=100,
        batch_size=8,
        noise_samples=2,
    )  # fmt: skip
    found = heldout_loss(params)

    def results(shift):
        captions = [pictures[(i + shift) % 7]["caption_latents"] for i in range(7)]
        batch = {
            "latents": np.stack([pictures[i]["latents"] for i in range(7)]),
            "caption_latents": np.stack(captions),
        }
        draws = [formula(params, batch | {"draw": np.uint32(i)}) for i in range(2)]
        return (np.concatenate([draw[i] for draw in draws]) for i in range(2))

    losses, sigma = results(0)
    assert found["right"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["shuffled"] == pytest.approx(next(results(3)).mean(), rel=1e-5)
    assert found["ratio"] == found["right"] / found["shuffled"] != 1
    level = np.argmin(np.abs(np.log(sigma[:, None] / sigma_levels(EDM))), axis=1)
    assert 1 < len(set(level)) < 9  # some levels have draws and some have none
    for i, (name, value) in enumerate(found["by_sigma"].items()):
        assert float(name) == pytest.approx(sigma_levels(EDM)[i], rel=1e-2)
        expected = losses[level == i].mean() if np.any(level == i) else np.nan
        assert value == pytest.approx(expected, rel=1e-5, nan_ok=True)
