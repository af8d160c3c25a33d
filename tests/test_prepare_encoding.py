"""Encoding: noise that belongs to an image, and batches that fill up."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from microdit_jax.prepare.decoding import DecodedImage
from microdit_jax.prepare.encoding import DeviceTowers, SkippedImage, encode_parts, image_noise
from microdit_jax.prepare.options import PrepareOptions

NOISE = {
    (0, "a", (2,)): [0.7553648352622986, -1.2013909816741943],
    (2024, "1/2", (2, 2, 1)): [
        -0.4544230103492737, -0.022270554676651955, -0.5854869484901428, -0.3229292035102844,
    ],
}  # fmt: skip
OPTIONS = PrepareOptions(resolutions=(8,), min_size=8, seed=0, batch=4)


def test_an_images_noise_stays_what_it_is():
    """Recorded; other noise would give prepared datasets other latents."""
    for arguments, expected in NOISE.items():
        np.testing.assert_array_equal(image_noise(*arguments).ravel(), np.float32(expected))


def test_noise_depends_on_the_seed_the_image_and_the_resolution():
    first = image_noise(0, "a", (4, 8, 8)).ravel()
    for other in ((1, "a", (4, 8, 8)), (0, "b", (4, 8, 8)), (0, "a", (4, 16, 16))):
        correlation = np.corrcoef(first, image_noise(*other).ravel()[: first.size])[0, 1]
        assert abs(correlation) < 0.25  # 256 pairs: four standard deviations


class Towers(DeviceTowers):
    """Latents that are the mean of an image; keeps the sizes of the batches."""

    def __init__(self):
        object.__setattr__(self, "sizes", [])

    def latents(self, images, ids):
        self.sizes.append(len(images))
        return images.mean((1, 2))[:, None, None, :1]

    def embeddings(self, texts):
        return np.array([[[len(text)]] for text in texts], np.float32)


def decoded(part, count, skipped=0):
    for i in range(count):
        yield part, DecodedImage(f"{part}/{i}", "c" * i, (np.full((8, 8, 3), 10 * i, np.uint8),))
    for i in range(skipped):
        yield part, DecodedImage(f"{part}/bad{i}", "", (), "damaged")
    yield part, None


def test_batches_are_full_and_every_image_gives_its_own_record_in_order():
    towers = Towers()
    items = [*decoded(0, 6, skipped=1), *decoded(1, 0, skipped=2), *decoded(2, 4)]
    with ThreadPoolExecutor(1) as pool:
        found = list(encode_parts(iter(items), [towers], OPTIONS, pool))
    assert towers.sizes == [4, 4, 4]  # the second filled up; nothing runs for an empty part
    assert [part for part, _ in found] == [0] * 8 + [1] * 3 + [2] * 5
    for part, count, skipped in ((0, 6, 1), (1, 0, 2), (2, 4, 0)):
        *here, end = [item for number, item in found if number == part]
        assert end is None
        assert here[count:] == [SkippedImage(f"{part}/bad{i}", "damaged") for i in range(skipped)]
        for i, record in enumerate(here[:count]):
            assert record["id"] == f"{part}/{i}" and record["caption"] == "c" * i
            assert record["caption_latents"].tolist() == [[i]]
            np.testing.assert_allclose(record["latents_8"], (10 * i / 127.5 - 1), atol=1e-3)
