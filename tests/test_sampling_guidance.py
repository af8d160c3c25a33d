"""Guidance: its default scale, and the guided network."""

import jax.numpy as jnp
import numpy as np
import pytest

from microdit_jax import diffusion
from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.sampling import guidance


def test_default_scale():
    class Tower(TokenTable):
        pretrained = True

    assert guidance.default_scale(TokenTable(24, 7, 0)) == 3.0  # emoji
    assert guidance.default_scale(Tower(24, 7, 0)) == 5.0  # the reference's
    assert guidance.default_scale(Tower(24, 7, 0), recorded=2.5) == 2.5  # a run's own
    assert guidance.default_scale(Tower(24, 7, 0), "cfgpp", recorded=2.5) == guidance.CFGPP_SCALE


def test_guidance_by_hand():
    """Rows alternate: with caption, without; scale 3 goes three times the way between them."""
    caption = guidance.interleave(jnp.array([5.0, 7.0]), jnp.zeros(2))

    def network(x, c_noise):
        return x * c_noise[:, None, None, None] + caption[:, None, None, None]

    x = jnp.arange(8.0).reshape(2, 2, 2, 1)
    found = guidance.guided(network, 3.0)(x, jnp.array([1.0, 2.0]))
    expected = np.asarray(x) * np.array([1, 2]).reshape(2, 1, 1, 1)
    expected = expected + 3 * np.array([5, 7]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# ------------------------------------------------------------------------------ adjusted guidance
RNG = np.random.default_rng(0)
X, AVERAGE = RNG.normal(size=(2, 3, 2, 2, 1))
SIGMA = np.array([0.5, 2.0, 7.0])


def network(x, c_noise):
    """Rows alternate between two functions, which no scale makes the other."""
    cond = jnp.arange(len(x))[:, None, None, None] % 2 == 0
    return jnp.where(cond, jnp.sin(3 * x) + c_noise[:, None, None, None], 0.3 * x)


def adjusted_by_hand(scale, rescale, eta, beta, r):
    """Float64, image by image, in the paper's order."""
    results, averages = [], []
    for x, sigma, running in zip(X, SIGMA, AVERAGE, strict=True):
        total = sigma**2 + 0.9**2
        c_skip, c_out, c_in = 0.81 / total, sigma * 0.9 / total**0.5, total**-0.5
        D_cond = c_skip * x + c_out * (np.sin(3 * c_in * x) + np.log(sigma) / 4)
        D_uncond = c_skip * x + c_out * 0.3 * c_in * x
        averages.append(D_cond - D_uncond + beta * running)
        difference = averages[-1]
        if r:
            difference = difference * min(1, r / np.linalg.norm(difference))
        unit = D_cond / np.linalg.norm(D_cond)
        parallel = (difference * unit).sum() * unit
        D = D_cond + (scale - 1) * (difference - parallel + eta * parallel)
        rescaled = D * D_cond.std() / D.std()
        results.append(rescale * rescaled + (1 - rescale) * D)
    return np.stack(results), np.stack(averages)


@pytest.mark.parametrize(
    "numbers",
    [
        (3.0, 0.0, 1.0, 0.0, 0.0),  # classifier-free guidance
        (3.0, 0.7, 1.0, 0.0, 0.0),
        (4.0, 0.0, 0.0, -0.5, 0.0),
        (4.0, 0.0, 0.2, 0.0, 0.8),
        (2.5, 0.4, 0.1, -0.75, 1.1),
    ],
)
def test_adjusted_guidance_by_hand(numbers):
    strength = guidance.Strength(*numbers).as_float32()
    arrays = (jnp.asarray(a, jnp.float32) for a in (X, SIGMA, AVERAGE))
    x, sigma, average = arrays
    found, running = guidance.adjusted(network, x, sigma, average, strength, 0.9)
    expected, expected_running = adjusted_by_hand(*numbers)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(running, expected_running, rtol=2e-5, atol=1e-6)
    if numbers[1:] == (0, 1, 0, 0):
        plain = diffusion.denoiser(guidance.guided(network, numbers[0]), 0.9)(x, sigma)
        np.testing.assert_allclose(found, plain, rtol=2e-5, atol=1e-6)
