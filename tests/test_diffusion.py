"""EDM against the recorded reference: losses, trajectories, guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2

from microdit_jax import diffusion
from microdit_jax.sampling import schedules, solvers
from microdit_jax.sampling.guidance import guided, interleave

EDM = diffusion.EdmConfig()


def heun(denoise, noise, steps, config=EDM):
    return solvers.sample(denoise, noise, solvers.heun_evaluations(steps, config), config)


def network_for(golden, *, guidance=None, **options):
    y = golden["y"]
    if guidance is not None:
        y = interleave(y, jnp.zeros_like(y))

    def network(x, c_noise):
        return golden.model.apply({"params": golden.params}, x, c_noise, y, **options)

    if guidance is None:
        return network
    return guided(lambda x, t: network(x, t)[0], jnp.float32(guidance))


def test_scalings_at_sigma_data():
    c = diffusion.scalings(jnp.array([0.9]), 0.9)
    expected = (0.5, 0.9 / 2**0.5, 1 / (0.9 * 2**0.5), np.log(0.9) / 4)
    np.testing.assert_allclose(np.concatenate(c), expected, rtol=1e-6)


@pytest.mark.parametrize("key, ratio", [("edm_loss", 0.0), ("edm_loss_masked", 0.75)])
def test_loss_equals_the_reference(golden, key, ratio):
    sigma = diffusion.training_sigma(golden["sigma_normal"], EDM)
    network = network_for(golden, mask_noise=golden["mask_noise"], mask_ratio=ratio)
    sizes = {"sigma_data": EDM.sigma_data, "patch_size": golden.config.patch_size}
    loss = jax.jit(lambda *args: diffusion.edm_loss(network, *args, **sizes).mean())(
        golden["latents"], golden["noise"], sigma
    )
    np.testing.assert_allclose(loss, golden[key], rtol=1e-5)


def test_guidance_equals_the_reference(golden):
    sample = jax.jit(network_for(golden, guidance=5.0))(golden["x"], golden["t"])
    assert relative_l2(sample, golden["sample_cfg5"]) < 5e-5


@pytest.mark.parametrize("steps", [8, 30])
@pytest.mark.parametrize("guidance", [1, 5])
def test_trajectory_equals_the_float64_reference(golden, steps, guidance):
    key = f"sampled_steps{steps}_cfg{guidance}"
    if key not in golden.arrays:
        assert steps == 30  # only dit_small records 30 steps
        return
    if guidance > 1:
        network = network_for(golden, guidance=float(guidance))
    else:
        plain = network_for(golden)
        network = lambda x, t: plain(x, t)[0]  # noqa: E731
    denoise = diffusion.denoiser(network, EDM.sigma_data)
    sample = jax.jit(lambda x: heun(denoise, x, steps))(golden["x_init"])
    found, expected = np.asarray(sample, np.float64), np.asarray(golden[key], np.float64)
    if relative_l2(found, expected) < 1e-5:
        return
    # Under another XLA (seen with jax 0.8.0) a near tie sent one token to another expert. Then a
    # few percent of the values are off, the others stay, and the contract's 1e-3 still holds.
    errors = np.abs(found - expected) / expected.std()
    assert relative_l2(found, expected) < 1e-3
    assert np.median(errors) < 1e-5 and np.mean(errors > 1e-4) < 0.05


def test_sampler_traces_the_network_once():
    calls = []

    def network(x, c_noise):
        calls.append(1)
        return jnp.zeros_like(x)

    denoise = diffusion.denoiser(network, EDM.sigma_data)
    jax.jit(lambda x: heun(denoise, x, 30)).lower(jnp.zeros((1, 4, 4, 1)))
    assert len(calls) == 1


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_sampler_reaches_the_mean_of_gaussian_data(steps):
    # For data N(m, s^2) the exact denoiser is affine, and any step count ends near the data.
    mean, std = 0.3, 0.9

    def denoise(x, sigma):
        s2 = jnp.square(sigma)[:, None, None, None]
        return (std**2 * x + s2 * mean) / (std**2 + s2)

    noise = jax.random.normal(jax.random.key(0), (8, 16, 16, 4))
    sample = heun(denoise, noise, steps)
    assert np.isfinite(sample).all()
    if steps != 2:  # two steps, 80 -> 0.002 -> 0, overshoot
        assert abs(float(sample.mean()) - mean) < 0.05
    if steps == 30:
        assert abs(float(sample.std()) - std) < 0.05


def test_sigma_steps():
    steps = schedules.edm_levels(18, EDM)
    assert len(steps) == 19 and steps[-1] == 0
    np.testing.assert_allclose(steps[[0, -2]], [80, 0.002], rtol=1e-12)


# ------------------------------------------------------------------------------ by hand
OTHER = diffusion.EdmConfig(
    sigma_data=0.5, P_mean=0.4, P_std=0.7, sigma_min=0.05, sigma_max=9.0, rho=5.0
)


def affine_denoiser(x, sigma):
    """Not the exact denoiser of anything: slopes differ at every level."""
    if isinstance(sigma, float):
        return x / (1 + sigma) + 0.1 * sigma
    return x / (1 + sigma)[:, None, None, None] + (0.1 * sigma)[:, None, None, None]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sampler_is_algorithm_1(steps):
    """Float64 NumPy, step by step, with every level off its default."""
    noise = np.random.default_rng(0).normal(size=(2, 3, 3, 1))
    found = heun(affine_denoiser, jnp.float32(noise), steps, OTHER)

    i = np.arange(steps) / max(steps - 1, 1)
    levels = (9.0 ** (1 / 5) + i * (0.05 ** (1 / 5) - 9.0 ** (1 / 5))) ** 5
    levels = [float(level) for level in (*levels, 0.0)]
    x = noise * 9.0
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        slope = (x - affine_denoiser(x, now)) / now
        x_next = x + (following - now) * slope
        if following > 0:
            slope_next = (x_next - affine_denoiser(x_next, following)) / following
            x_next = x + (following - now) * (slope + slope_next) / 2
        x = x_next
    assert relative_l2(found, x) < 1e-5


def test_start_and_evaluations_follow_the_config():
    state = solvers.start(jnp.ones((1, 2, 2, 1)), OTHER)
    np.testing.assert_array_equal(state.x, np.full((1, 2, 2, 1), 9, np.float32))
    np.testing.assert_array_equal(state.x_start, state.x)
    assert not state.last.any() and not state.before.any()
    rows = solvers.heun_evaluations(3, OTHER)
    np.testing.assert_allclose([rows[i].sigma for i in (0, 3, 4)], [9, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_array_equal([row.restarts for row in rows], [1, 0, 1, 0, 1])
    np.testing.assert_allclose(sum(row.predictor.step for row in rows), -9, rtol=1e-6)


def test_preview_is_the_denoised_image():
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 3, 1)), jnp.float32)
    start = solvers.start(noise, OTHER)
    row = solvers.heun_evaluations(4, OTHER)[0]
    state = solvers.evaluate(affine_denoiser, start, row)
    found = solvers.denoised(state, row)
    np.testing.assert_allclose(found, affine_denoiser(start.x, jnp.full(2, 9.0)), rtol=2e-5)


def test_training_sigma_follows_the_config():
    normal = np.random.default_rng(2).normal(size=9)
    found = diffusion.training_sigma(jnp.float32(normal), OTHER)
    np.testing.assert_allclose(found, np.exp(0.4 + 0.7 * normal), rtol=1e-6)
