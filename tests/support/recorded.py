"""State dicts of recorded towers, and what the tests of conversion compare."""

import numpy as np
from conftest import GOLDEN


def recorded(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A golden file's state dict, and its other arrays."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    prefix = "state_dict/"
    tensors = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return tensors, {k: v for k, v in arrays.items() if not k.startswith(prefix)}


def of_zeros(shapes) -> dict[str, np.ndarray]:
    """A state dict of the right shapes that takes no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name].view(np.uint32), tensor.view(np.uint32))
