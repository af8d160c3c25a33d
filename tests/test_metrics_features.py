import jax
import numpy as np
import pytest
from conftest import relative_l2
from support.inception import NARROW, synthetic_tensors

from microdit_jax.convert.inception import from_torch
from microdit_jax.metrics.features import FeatureNetwork, inception_features, small_features
from microdit_jax.metrics.frechet import Statistics, frechet_distance


def random_images(n: int, size=(20, 24)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for _ in range(n)]


@pytest.fixture(scope="module")
def narrow():
    params = from_torch(synthetic_tensors(NARROW), NARROW)
    return inception_features(NARROW, params, weights="abcdef", batch=8)


def test_one_and_eight_devices_give_equal_statistics():
    images = random_images(20)
    eight = small_features(batch=8)
    assert len(jax.tree.leaves(eight._params)[0].sharding.device_set) == 8
    one = small_features(batch=8)
    one._params = jax.device_put(eight._params, jax.local_devices()[0])
    a, b = Statistics.of(one(images)), Statistics.of(eight(images))
    assert relative_l2(a.mean, b.mean) < 1e-6 and relative_l2(a.covariance, b.covariance) < 1e-6
    assert eight(images).shape == (20, eight.width) and eight([]).shape == (0, 112)


def test_small_features_are_the_same_everywhere():
    # By a plain numpy loop over the first layer, so that the weights cannot change unnoticed.
    image = random_images(1, (32, 32))[0]
    found = small_features()([image])[0]
    rng = np.random.RandomState(0)
    kernel = rng.standard_normal((3, 3, 3, 16)) * np.sqrt(2 / 27)
    x = np.pad(image / 127.5 - 1, ((1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(0, 1))  # 32 32 3 3 3
    first = np.maximum(np.einsum("hwcij,ijcd->hwd", windows, kernel), 0).mean((0, 1))
    np.testing.assert_allclose(found[:16], first, rtol=1e-4)


def test_small_features_see_worse_images():
    rng = np.random.default_rng(1)
    smooth = np.linspace(0, 255, 32)[:, None, None] + rng.uniform(-40, 40, (60, 1, 1, 3))
    clean = [np.broadcast_to(image, (32, 32, 3)).clip(0, 255).astype(np.uint8) for image in smooth]
    network = small_features()
    reference = Statistics.of(network(clean[:30]))

    def distance(images):
        return frechet_distance(Statistics.of(network(images)), reference)

    def noisy(scale):
        noise = rng.normal(0, scale, (30, 32, 32, 3))
        pairs = zip(clean[30:], noise, strict=True)
        return [np.clip(image + error, 0, 255).astype(np.uint8) for image, error in pairs]

    distances = [distance(clean[30:]), distance(noisy(20)), distance(noisy(60))]
    assert distances == sorted(distances) and distances[2] > 10 * distances[0]


def test_inceptions_layer_and_name(narrow):
    images = random_images(2)
    assert narrow.name == "inception:weights=abcdef,layer=pool_3,resize=clean"
    assert narrow.width == 128 and narrow(images).shape == (2, 128)


def test_batches_compile_once():
    calls = []

    def apply(params, x):
        calls.append(x.shape)  # only while it is traced
        return x * params

    network = FeatureNetwork(
        "sum", 1, np.float32(2), apply,
        lambda images: np.array([[image.sum()] for image in images], np.float32), batch=3,
    )  # fmt: skip
    images = random_images(19)
    np.testing.assert_allclose(network(images)[:, 0], [2 * i.sum() for i in images], rtol=1e-6)
    assert calls == [(8, 1)]
