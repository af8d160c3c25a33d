"""The patch codec: exact where it keeps everything, best in the mean where it does not."""

import numpy as np
import pytest

from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.errors import UserError


@pytest.fixture(scope="module")
def images():
    """Smooth random pictures: neighbouring pixels go together, as in real ones."""
    noise = np.random.default_rng(0).standard_normal((40, 16, 16, 3)).astype(np.float32)
    smooth = sum(np.roll(noise, (i, j), (1, 2)) for i in range(5) for j in range(5)) / 8
    return np.clip(smooth, -1, 1)


def test_all_components_give_the_images_back(images):
    codec = PatchPCA.fit(images, patch=4, channels=48)
    latents = codec.encode(images)
    assert latents.shape == (40, 4, 4, 48) and latents.dtype == np.float32
    np.testing.assert_allclose(codec.decode(latents), images, atol=2e-5)


def test_fewer_components_lose_exactly_the_variance_left_out(images):
    errors = []
    for channels in (4, 8, 16, 32):
        codec = PatchPCA.fit(images, patch=4, channels=channels)
        # a patch minus its projection, not clipped
        patches = images.reshape(40, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
        centred = patches - patches.mean(0)
        eigenvalues = np.linalg.eigvalsh(np.cov(centred.T, bias=True))[::-1]
        residual = centred - centred @ codec.basis @ codec.basis.T
        np.testing.assert_allclose(
            (residual**2).sum(1).mean(), eigenvalues[channels:].sum(), rtol=1e-3
        )
        errors.append(np.mean((codec.decode(codec.encode(images)) - images) ** 2))
    assert errors == sorted(errors, reverse=True)


def test_a_latent_is_of_its_own_patch(images):
    codec = PatchPCA.fit(images, patch=4, channels=8)
    changed = images.copy()
    changed[:, 4:8, 12:16] *= -1
    difference = np.any(codec.encode(changed) != codec.encode(images), axis=(0, 3))
    expected = np.zeros((4, 4), bool)
    expected[1, 3] = True
    np.testing.assert_array_equal(difference, expected)


def test_scaled_latents_have_the_deviation_of_sigma_data(images):
    codec = PatchPCA.fit(images, patch=4, channels=8)
    scaled = codec.encode(images) * codec.scaling_factor
    # whole variance over mean zero, as EDM counts it
    assert np.sqrt(np.mean(scaled.astype(np.float64) ** 2)) == pytest.approx(0.9, rel=1e-4)
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-4)


def test_fitting_again_gives_the_same_codec(images):
    first, second = (PatchPCA.fit(images, patch=4, channels=8) for _ in range(2))
    for key in ("mean", "basis", "gain"):
        np.testing.assert_array_equal(getattr(first, key), getattr(second, key))
    assert first.scaling_factor == second.scaling_factor and first.name == second.name
    # the order of the pictures changes rounding only, never a sign
    turned = PatchPCA.fit(images[::-1], patch=4, channels=8)
    np.testing.assert_allclose(turned.basis, first.basis, atol=1e-4)


def test_save_and_load(images, tmp_path):
    codec = PatchPCA.fit(images, patch=4, channels=8)
    codec.save(tmp_path / "codec")
    loaded = PatchPCA.load(tmp_path / "codec")
    assert (loaded.name, loaded.patch, loaded.channels) == (codec.name, 4, 8)
    assert loaded.scaling_factor == codec.scaling_factor
    np.testing.assert_array_equal(loaded.encode(images), codec.encode(images))


def test_names_tell_codecs_apart(images):
    names = {
        PatchPCA.fit(images, patch=4, channels=8).name,
        PatchPCA.fit(images, patch=4, channels=9).name,
        PatchPCA.fit(images, patch=8, channels=8).name,
        PatchPCA.fit(images[1:], patch=4, channels=8).name,
    }
    assert len(names) == 4


def test_misfits_are_named(images, tmp_path):
    codec = PatchPCA.fit(images, patch=4, channels=8)
    with pytest.raises(UserError, match="1 to 48 channels .* found 49"):
        PatchPCA.fit(images, patch=4, channels=49)
    with pytest.raises(UserError, match="multiples of 5 pixels, found 16x16x3"):
        PatchPCA.fit(images, patch=5, channels=8)
    with pytest.raises(UserError, match="8 channels, found 4"):
        codec.decode(np.zeros((1, 4, 4, 4), np.float32))
    with pytest.raises(UserError, match="could not read"):
        PatchPCA.load(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "version", "basis"])
def test_damaged_files_are_refused(images, tmp_path, damage):
    codec = PatchPCA.fit(images, patch=4, channels=8)
    codec.save(tmp_path)
    arrays, about = tmp_path / "codec.npz", tmp_path / "codec.json"
    if damage == "truncated":
        arrays.write_bytes(arrays.read_bytes()[:-200])
    elif damage == "version":
        about.write_text(about.read_text().replace('"version": 1', '"version": 2'))
    else:
        np.savez(arrays, mean=codec.mean, basis=codec.basis[:, :4], gain=codec.gain)
    with pytest.raises(UserError, match="expected .* codec.*prepare the data again"):
        PatchPCA.load(tmp_path)
