import numpy as np
import pytest
from conftest import GOLDEN

from microdit_jax.errors import UserError
from microdit_jax.metrics.resize import MODES, resize, to_inputs


@pytest.fixture(scope="module")
def golden():
    """Images, and what clean-fid 0.1.35, torch and torch-fidelity 0.4.0 make of them."""
    with np.load(GOLDEN / "resize.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", range(5))
def test_equal_to_the_public_ones(golden, mode, index):
    expected = golden[f"{mode}{index}"]
    found = resize(golden[f"image{index}"], mode, height=len(expected), width=expected.shape[1])
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-6 * 255
    if index != 3:  # which keeps its size
        other = resize(golden[f"image{index}"], {"clean": "pytorch_fid"}.get(mode, "clean"),
                       height=len(expected), width=expected.shape[1])  # fmt: skip
        assert np.abs(other - expected).max() > 1


def test_nothing_is_rounded_or_out_of_range():
    sharp = np.zeros((20, 20, 3), np.uint8)
    sharp[5:15, 5:15] = 255
    for mode in MODES:
        found = resize(sharp, mode, height=33, width=33)
        assert 0 <= found.min() and found.max() <= 255 + 1e-4
        assert (found % 1 > 0.01).any()


def test_the_networks_input_range():
    gray = [np.full((8, 6, 3), value, np.uint8) for value in (0, 255)]
    for mode, (low, high) in {
        "clean": (-1, 127 / 128),
        "pytorch_fid": (-1, 1),
        "torch_fidelity": (-1, 127 / 128),
    }.items():
        x = to_inputs(gray, mode)
        assert x.shape == (2, 299, 299, 3) and x.dtype == np.float32
        np.testing.assert_allclose(x[0], low, atol=1e-6)
        np.testing.assert_allclose(x[1], high, atol=1e-6)


def test_an_unknown_mode():
    with pytest.raises(UserError, match="one of clean, pytorch_fid, torch_fidelity, found 'tf'"):
        to_inputs([np.zeros((4, 4, 3), np.uint8)], "tf")
