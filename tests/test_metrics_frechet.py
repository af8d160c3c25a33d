import json

import numpy as np
import pytest
import scipy.linalg
from conftest import GOLDEN

from microdit_jax.errors import UserError
from microdit_jax.metrics import feature_sets
from microdit_jax.metrics.feature_sets import kernel_distance, precision_recall
from microdit_jax.metrics.frechet import RunningStatistics, Statistics, frechet_distance

# What pytorch-fid 0.3.0 and torch-fidelity 0.4.0 give for `pair`; in half of them a covariance is
# singular (fewer images than features, or features that are zero).
ROWS = json.loads((GOLDEN / "frechet.json").read_text())


def pair(row):
    """Two random sets of features as the golden values were computed from."""
    rng, width = np.random.default_rng(row["seed"]), row["width"]
    mix = rng.standard_normal((width, width)) / np.sqrt(width)
    a = np.maximum(rng.standard_normal((row["n"], width)) @ mix, 0)
    b = np.maximum(1.2 * rng.standard_normal((row["m"], width)) + 0.1, 0)
    a[:, : row["dead"]] = b[:, : row["dead"]] = 0
    return a, b


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"pair{row['seed']}")
def test_equal_to_both_public_ones(row):
    a, b = (Statistics.of(features) for features in pair(row))
    found = frechet_distance(a, b)
    for theirs in ("pytorch_fid", "torch_fidelity"):
        assert found == pytest.approx(row[theirs], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"pair{row['seed']}")
def test_kernel_distance(row, monkeypatch):
    monkeypatch.setattr(feature_sets, "SUBSETS", 7)
    kid = kernel_distance(*pair(row), subset_size=row["kid_subset"])
    assert kid.mean == pytest.approx(row["kid_mean"], rel=1e-6, abs=1e-12)
    assert kid.std == pytest.approx(row["kid_std"], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("row", ROWS[:-1], ids=lambda row: f"pair{row['seed']}")
def test_precision_and_recall(row, monkeypatch):
    monkeypatch.setattr(feature_sets, "NEIGHBOURS", row["neighbours"])
    found = precision_recall(*pair(row))
    assert found.precision == pytest.approx(row["precision"], abs=1e-6)
    assert found.recall == pytest.approx(row["recall"], abs=1e-6)


def test_batches_give_numpys_mean_and_covariance():
    rng = np.random.default_rng(0)
    features = (1000 + rng.standard_normal((500, 12)) * 1e-2).astype(np.float32)
    running = RunningStatistics(12)
    for rows in np.split(features, [0, 1, 7, 200, 450]):
        running.add(rows)
    found = running.result()
    assert found.count == 500
    exact = features.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
    covariance = np.cov(exact, rowvar=False)
    assert np.abs(found.covariance - covariance).max() < 1e-9 * np.abs(covariance).max()


def test_a_square_root_that_is_not_finite_is_taken_again_with_an_offset(monkeypatch):
    a, b = (Statistics.of(features) for features in pair(ROWS[0]))
    real, seen = scipy.linalg.sqrtm, []

    def fails_once(matrix):
        seen.append(matrix)
        return np.full_like(matrix, np.nan) if len(seen) == 1 else real(matrix)

    expected = frechet_distance(a, b)
    monkeypatch.setattr(scipy.linalg, "sqrtm", fails_once)
    found, offset = frechet_distance(a, b), 1e-6 * np.eye(8)
    np.testing.assert_array_equal(seen[1], (a.covariance + offset) @ (b.covariance + offset))
    assert len(seen) == 2 and 0 < abs(found - expected) < 1e-4


def test_an_imaginary_part_is_refused_or_dropped():
    mean = np.zeros(2)
    for off, fails in ((1e-4, False), (1.0, True)):
        a = Statistics(mean, np.diag([1.0, -(off**2)]))  # its root has off * 1j
        b = Statistics(mean, np.eye(2))
        if fails:
            with pytest.raises(UserError, match="found an imaginary part of 1; take more"):
                frechet_distance(a, b)
        else:
            assert frechet_distance(a, b) == pytest.approx(3 - 2 - off**2)


def test_bad_features():
    running = RunningStatistics(3)
    running.add(np.zeros((1, 3)))
    running.add(np.zeros((0, 3)))
    with pytest.raises(UserError, match="two or more images, found 1"):
        running.result()
    with pytest.raises(UserError, match="expected features 3 wide, found 4"):
        running.add(np.zeros((2, 4)))
    with pytest.raises(UserError, match="expected finite features, found NaN"):
        running.add(np.full((2, 3), np.nan))
    wide, narrow = Statistics.of(np.eye(3)), Statistics.of(np.eye(4))
    with pytest.raises(UserError, match="one width, found 3 and 4"):
        frechet_distance(wide, narrow)
    with pytest.raises(UserError, match="expected 1000 images or more on either side, found 3"):
        kernel_distance(np.eye(3), np.eye(3))
    with pytest.raises(UserError, match="expected more than 3 images on either side, found 3"):
        precision_recall(np.eye(3), np.eye(3))
