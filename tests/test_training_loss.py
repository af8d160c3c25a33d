"""The loss of a batch against the paper's equations in NumPy, with no option at its default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from microdit_jax.diffusion import EdmConfig
from microdit_jax.models.dit import DiT, DiTConfig
from microdit_jax.training.loss import batch_loss, with_position

N, SIDE, CHANNELS, PATCH = 6, 8, 3, 4
CONFIG = DiTConfig(
    input_size=SIDE, patch_size=PATCH, in_channels=CHANNELS, dim=8, depth=1, head_dim=4,
    patch_mixer_depth=1, patch_mixer_dim=4, caption_channels=5,
)  # fmt: skip
EDM = EdmConfig(sigma_data=0.5, P_mean=0.4, P_std=0.7)
KEY = jax.random.key(7)


class WrittenOut(DiT):
    """A network whose output is easy to write down: 0.3 x + c_noise + a number of each caption."""

    def apply(self, variables, x, t, y, *, mask_noise, mask_ratio):
        weight = variables["params"]["weight"]
        out = weight * x + (t + y.mean(axis=(1, 2)))[:, None, None, None]
        if mask_ratio == 0:
            return out, None
        # The half of an image's patches with the larger noise is dropped.
        return out, (mask_noise > jnp.median(mask_noise, axis=1, keepdims=True)).astype(x.dtype)


MODEL, PARAMS = WrittenOut(CONFIG), {"weight": jnp.float32(0.3)}


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "latents": rng.normal(size=(N, SIDE, SIDE, CHANNELS)).astype(np.float32),
        "caption_latents": rng.normal(size=(N, 7, 5)).astype(np.float16),
        "keep_caption": np.array([1, 0, 1, 1, 0, 1], np.float32),
        "position": np.array([3, 0, 11, 7, 2, 5], np.int32),
    }


def oracle(batch, mask_ratio):
    """Each image's loss and noise level, image by image and patch by patch, in float64."""
    losses, sigmas = [], []
    for latents, y, keep, position in zip(*(batch[name] for name in (
        "latents", "caption_latents", "keep_caption", "position")), strict=True):  # fmt: skip
        keys = jax.random.split(jax.random.fold_in(KEY, position), 3)
        normal = float(jax.random.normal(keys[0], ()))
        noise = np.asarray(jax.random.normal(keys[1], latents.shape), np.float64)
        uniform = np.asarray(jax.random.uniform(keys[2], (1, (SIDE // PATCH) ** 2))[0])
        latents = latents.astype(np.float64)
        # Table 1: ln(sigma) ~ N(P_mean, P_std^2), the scalings, lambda(sigma)
        sigma = np.exp(0.4 + 0.7 * normal)
        s2, d2 = sigma**2, 0.5**2
        c_skip, c_out = d2 / (s2 + d2), sigma * 0.5 / np.sqrt(s2 + d2)
        c_in, c_noise = 1 / np.sqrt(s2 + d2), np.log(sigma) / 4
        weight = (s2 + d2) / (sigma * 0.5) ** 2
        # Equation 7
        x = latents + sigma * noise
        F_x = 0.3 * c_in * x + c_noise + keep * y.astype(np.float64).mean()
        D_x = c_skip * x + c_out * F_x
        # Equation 8, over the patches that the network saw
        seen = []
        for i, u in enumerate(uniform):
            row, column = divmod(i, SIDE // PATCH)
            at = np.s_[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            if mask_ratio == 0 or u <= np.median(uniform):
                seen.append(weight * ((D_x - latents)[at] ** 2).mean())
        losses.append(np.mean(seen))
        sigmas.append(sigma)
    return np.array(losses), np.array(sigmas)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_loss_equals_the_equations(mask_ratio):
    batch = make_batch()
    loss, sigma = batch_loss(
        MODEL, PARAMS, jax.tree.map(jnp.asarray, batch), KEY, edm=EDM, mask_ratio=mask_ratio
    )
    expected_loss, expected_sigma = oracle(batch, mask_ratio)
    np.testing.assert_allclose(sigma, expected_sigma, rtol=1e-5)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert loss.dtype == sigma.dtype == jnp.float32


def test_every_image_has_a_mask_of_its_own():
    seen = []

    class Recording(WrittenOut):
        def apply(self, variables, x, t, y, *, mask_noise, mask_ratio):
            seen.append(np.asarray(mask_noise))
            return x, None

    batch = jax.tree.map(jnp.asarray, make_batch())
    batch_loss(Recording(CONFIG), PARAMS, batch, KEY, edm=EDM, mask_ratio=0.5)
    assert seen[0].shape == (N, 4) and len(np.unique(seen[0])) == 4 * N


def test_a_batch_without_positions_is_refused():
    """Inside shard_map it could only count its own rows: every device would see the same noise."""
    batch = {name: jnp.asarray(value) for name, value in make_batch().items() if name != "position"}
    with pytest.raises(ValueError, match=r'expects batch\["position"\], found caption_latents, '):
        batch_loss(MODEL, PARAMS, batch, KEY, edm=EDM, mask_ratio=0.0)
    np.testing.assert_array_equal(with_position(batch)["position"], range(N))
    given = batch | {"position": jnp.arange(N, dtype=jnp.int32) + 9}
    np.testing.assert_array_equal(with_position(given)["position"], np.arange(N) + 9)
