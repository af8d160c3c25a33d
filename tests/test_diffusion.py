"""EDM against the recorded reference: losses, trajectories, guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2

from microdit_jax import diffusion
from microdit_jax.errors import UserError

EDM = diffusion.EdmConfig()


def network_for(golden, *, guidance=None, **options):
    y = golden["y"]
    if guidance is not None:
        y = diffusion.interleave(y, jnp.zeros_like(y))

    def network(x, c_noise):
        return golden.model.apply({"params": golden.params}, x, c_noise, y, **options)

    if guidance is None:
        return network
    return diffusion.guided(lambda x, t: network(x, t)[0], jnp.float32(guidance))


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
    sample = jax.jit(lambda x: diffusion.heun_sampler(denoise, x, steps))(golden["x_init"])
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
    jax.jit(lambda x: diffusion.heun_sampler(denoise, x, 30)).lower(jnp.zeros((1, 4, 4, 1)))
    assert len(calls) == 1


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_sampler_reaches_the_mean_of_gaussian_data(steps):
    # For data N(m, s^2) the exact denoiser is affine, and any step count ends near the data.
    mean, std = 0.3, 0.9

    def denoise(x, sigma):
        s2 = jnp.square(sigma)[:, None, None, None]
        return (std**2 * x + s2 * mean) / (std**2 + s2)

    noise = jax.random.normal(jax.random.key(0), (8, 16, 16, 4))
    sample = diffusion.heun_sampler(denoise, noise, steps)
    assert np.isfinite(sample).all()
    if steps != 2:  # two steps, 80 -> 0.002 -> 0, overshoot
        assert abs(float(sample.mean()) - mean) < 0.05
    if steps == 30:
        assert abs(float(sample.std()) - std) < 0.05


def test_sigma_steps():
    steps = diffusion.sigma_steps(18)
    assert len(steps) == 19 and steps[-1] == 0
    np.testing.assert_allclose(steps[[0, -2]], [80, 0.002], rtol=1e-12)
    with pytest.raises(UserError, match="at least 1"):
        diffusion.sigma_steps(0)
