"""Stochastic churn: EDM's Algorithm 2, and the noise that it adds."""

import numpy as np
import pytest
from conftest import relative_l2
from support import mixture
from support.tiny_pipeline import pipeline

from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.noise import added_noise, initial_noise
from microdit_jax.sampling.churn import Churn
from microdit_jax.sampling.schedules import edm_levels
from microdit_jax.sampling.settings import Sampler

EDM = EdmConfig()


def test_churn_is_algorithm_2():
    """Against the paper's loop in float64; a row at sigma-hat, then the corrector."""
    steps, churn, rng = 12, (40.0, 0.05, 50.0, 1.003), np.random.default_rng(0)
    plan = Sampler(num_inference_steps=steps, churn=churn).plan(EDM)
    noises = rng.normal(size=(len(plan), 2, 4, 4, 1))
    first = rng.normal(size=(2, 4, 4, 1)) * EDM.sigma_max

    def D(x, sigma):
        return mixture.denoise(x, sigma)

    levels, x, expected = edm_levels(steps, EDM), first, first
    number = 0
    for i in range(steps):
        t, following = levels[i], levels[i + 1]
        gamma = min(churn[0] / steps, np.sqrt(2) - 1) if churn[1] <= t <= churn[2] else 0.0
        hat = t + gamma * t
        expected = expected + np.sqrt(hat**2 - t**2) * churn[3] * noises[number]
        d = (expected - D(expected, hat)) / hat
        ahead = expected + (following - hat) * d
        if following:
            d = (d + (ahead - D(ahead, following)) / following) / 2
            number += 1
        number += 1
        expected = expected + (following - hat) * d

    start = last = x
    for number, evaluation in enumerate(plan):
        at = evaluation.at
        x = x + evaluation.noise * noises[number]
        slope = (x - D(x, float(at.sigma))) / float(at.sigma)
        if at.restarts:
            start = x
        else:
            start = start + at.corrector.step * (
                np.array(at.corrector.weights[:2]) @ [slope.ravel(), last.ravel()]
            ).reshape(x.shape)
        x, last = start + at.predictor.step * at.predictor.weights[0] * slope, slope
    assert relative_l2(x, expected) < 1e-5
    assert sum(e.noise > 0 for e in plan) == sum((levels >= 0.05) & (levels <= 50))


def test_no_churn_is_the_plain_solver():
    plain, none = (Sampler(churn=churn).plan(EDM) for churn in (None, (0.0, 0.05, 50.0, 1.0)))
    assert [e.noise for e in none] == [0.0] * 59
    np.testing.assert_equal([e.at for e in plain], [e.at for e in none])


def test_added_noise_is_a_function_of_seed_image_and_evaluation():
    shape = (8, 8, 4)
    base = added_noise(3, 1, 2, shape)
    np.testing.assert_array_equal(base, added_noise(3, 1, 2, shape))
    others = [added_noise(*key, shape) for key in ((4, 1, 2), (3, 2, 2), (3, 1, 3), (3, 2, 1))]
    others += list(initial_noise("jax", 3, 4, *shape))
    for other in others:
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.25
    assert abs(base.std() - 1) < 0.15


def test_images_of_any_batches_get_the_same_noise():
    pipe = pipeline()
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "churn": (3.0, 0.0, 80.0, 1.0)}
    whole = pipe.generate(["a", "dog"], seed=5, **options)
    (batch,) = pipe.sample(["dog"], indices=[1], total=2, seed=5, **options)
    np.testing.assert_allclose(batch.images[0], whole[1], atol=1e-5)
    plain = pipe.generate(["a", "dog"], seed=5, **options | {"churn": None})
    assert np.abs(plain - whole).max() > 1e-3


def test_seeds_of_one_call_are_those_of_many():
    """Each image is the first one of its seed, with the noise that is added on its way."""
    pipe = pipeline()
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "churn": (3.0, 0.0, 80.0, 1.0)}
    both = pipe.generate(["dog", "dog"], seed=[5, 9], **options)
    for image, seed in zip(both, (5, 9), strict=True):
        np.testing.assert_allclose(pipe.generate("dog", seed=seed, **options)[0], image, atol=1e-5)
    with pytest.raises(UserError, match="expected 2 seeds, one for each image, found 1"):
        pipe.generate(["dog", "dog"], seed=[5], **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"churn": (1.0, 2.0, 1.0, 1.0)}, "four finite numbers .* found 1, 2, 1, 1"),
        ({"churn": (-1.0, 0.0, 1.0, 1.0)}, "found -1, 0, 1, 1"),
        ({"churn": (1.0, 0.0, 1.0, float("nan"))}, "found 1, 0, 1, nan"),
        ({"churn": Churn(1.0), "solver": "ab3"}, "churn is for solver=heun, found solver=ab3"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampler(**options)
