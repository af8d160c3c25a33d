import numpy as np
import pytest

from microdit_jax.errors import UserError
from microdit_jax.metrics.clip_score import clip_score, cosines, mean_score


@pytest.mark.parametrize(
    ("n", "width", "shift", "expected"),
    # Values: torchmetrics 1.9.0, whose network returned these features.
    [(7, 16, 0.5, 19.836166381835938), (30, 64, 0.1, 9.710210800170898), (4, 8, -1.0, 0.0)],
)
def test_equal_to_torchmetrics(n, width, shift, expected):
    rng = np.random.default_rng(11)
    for sizes in ((7, 16), (30, 64), (4, 8)):  # one generator made all three
        texts = rng.standard_normal(sizes).astype(np.float32)
        noise = rng.standard_normal(sizes)
        if sizes == (n, width):
            break
    images = (noise + shift * texts).astype(np.float32)
    assert clip_score(images, texts) == pytest.approx(expected, rel=1e-6)
    # Lengths do not count, and the order does.
    assert clip_score(3 * images, texts) == pytest.approx(expected, rel=1e-6)
    if expected:
        assert abs(clip_score(images, np.roll(texts, 1, axis=0)) - expected) > 1


def test_the_mean_of_cosines():
    assert mean_score(np.array([[0.2], [0.4]])) == pytest.approx(30)
    assert mean_score(np.array([[-0.2]])) == 0


def test_known_angles():
    images = np.array([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    texts = np.array([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosines(images, texts), [1, 2**-0.5, -1])


def test_what_does_not_belong_together():
    with pytest.raises(UserError, match=r"found \(2, 3\) and \(1, 3\); give one text"):
        clip_score(np.ones((2, 3)), np.ones((1, 3)))
    with pytest.raises(UserError, match="one or more images, found none"):
        clip_score(np.ones((0, 3)), np.ones((0, 3)))
