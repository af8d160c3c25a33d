import dataclasses
import pickle

import numpy as np
import pytest

from microdit_jax.errors import UserError
from microdit_jax.metrics.frechet import Statistics
from microdit_jax.metrics.statistics import load_reference, save_reference, write_npz


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)


def test_ours_says_where_it_comes_from(tmp_path, features):
    path = tmp_path / "deep" / "reference.npz"
    saved = save_reference(path, features, name="small", inputs="abc")
    found = load_reference(path)
    expected = Statistics.of(features)
    np.testing.assert_array_equal(found.statistics.mean, expected.mean)
    np.testing.assert_array_equal(found.statistics.covariance, expected.covariance)
    np.testing.assert_array_equal(found.features, features)
    assert found.about == {"features": "small", "inputs": "abc", "count": 20}
    assert found.statistics.count == 20 and found.digest == saved.digest
    assert [p.name for p in path.parent.iterdir()] == ["reference.npz"]
    with np.load(path) as file:  # pytorch-fid's keys
        assert {"mu", "sigma"} <= set(file.files)
    changed = save_reference(path, features + np.float32(1), name="small", inputs="abc")
    assert changed.digest != found.digest
    # Another covariance about the same mean is another reference.
    wider = save_reference(path, 2 * (features - expected.mean) + expected.mean, name="small",
                           inputs="abc")  # fmt: skip
    np.testing.assert_allclose(wider.statistics.mean, expected.mean, atol=1e-6)
    same_mean = dataclasses.replace(wider.statistics, mean=expected.mean)
    assert dataclasses.replace(wider, statistics=same_mean).digest != found.digest


def test_other_peoples_files(tmp_path, features):
    expected = Statistics.of(features)
    # pytorch-fid, clean-fid and torch-fidelity: mu and sigma; compressed or not, float32 or not
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", mu=expected.mean, sigma=expected.covariance.astype(np.float32))
        found = load_reference(tmp_path / "a.npz")
        assert found.features is None and found.about == {} and found.statistics.count is None
        np.testing.assert_array_equal(found.statistics.mean, expected.mean)
        np.testing.assert_allclose(found.statistics.covariance, expected.covariance, rtol=1e-6)
    np.savez_compressed(tmp_path / "kid.npz", feats=features)  # clean-fid's for KID
    found = load_reference(tmp_path / "kid.npz")
    np.testing.assert_array_equal(found.statistics.covariance, expected.covariance)
    np.testing.assert_array_equal(found.features, features)


def test_other_features_are_refused(tmp_path, features):
    ours = save_reference(tmp_path / "a.npz", features, name="small", inputs="abc")
    ours.check_features("small", 4)
    with pytest.raises(UserError, match="statistics of inception, 4 wide, found small, 4 wide"):
        ours.check_features("inception", 4)
    np.savez(tmp_path / "b.npz", feats=features)
    theirs = load_reference(tmp_path / "b.npz")
    theirs.check_features("anything", 4)
    with pytest.raises(UserError, match="2048 wide, found unnamed ones, 4 wide"):
        theirs.check_features("inception", 2048)


def test_bad_files(tmp_path, features):
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match="could not read it .*No such file"):
        load_reference(path)
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="could not read it"):
        load_reference(path)
    np.savez_compressed(path, mu=features)
    whole = path.read_bytes()
    at, central = whole.index(b"mu.npy") + 26, whole.index(b"PK\x01\x02") + 10
    for place, wrong in ((at, b"\xff" * 9), (central, b"\x63")):  # its bytes; its compression
        path.write_bytes(whole[:place] + wrong + whole[place + len(wrong) :])
        with pytest.raises(UserError, match="could not read it"):
            load_reference(path)
    np.savez(path, mu=np.array([{}], object))
    with pytest.raises(UserError, match="could not read it"):
        load_reference(path)  # a pickle is never opened
    np.savez(path, latents=features)
    with pytest.raises(UserError, match="mu and sigma, or feats, in .*found latents"):
        load_reference(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 4)))
    with pytest.raises(UserError, match=r"found \(3,\) and \(3, 4\)"):
        load_reference(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_npz(tmp_path / "a.npz", {"x": np.arange(3)})
    before = (tmp_path / "a.npz").read_bytes()
    unwritable = np.array([lambda: 0], object)  # no pickle of it exists
    with pytest.raises((TypeError, AttributeError, ValueError, pickle.PicklingError)):
        write_npz(tmp_path / "a.npz", {"x": np.arange(4), "y": unwritable})
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_bytes() == before
