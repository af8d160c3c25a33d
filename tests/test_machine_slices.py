"""Meshes over nodes of GPUs and slices of TPUs: data across them, fsdp and expert inside."""

import dataclasses
import random

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from support.stand_in_devices import gpus, tpus

from microdit_jax import sharding
from microdit_jax.machine import slices


def ids(mesh) -> np.ndarray:
    return np.vectorize(lambda device: device.id)(mesh.devices)


def shuffled(devices):
    """As jax.devices() may list them: by process, not by slice."""
    devices = list(devices)
    random.Random(0).shuffle(devices)
    return devices


@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("sizes", [(-1, 8, 1), (-1, 1, 8), (-1, 4, 2), (-1, 2, 1), (-1, 1, 1)])
def test_data_goes_across_nodes_and_the_rest_stays_inside(nodes, sizes):
    mesh = sharding.make_mesh(*sizes, devices=shuffled(gpus(nodes, 8)))
    inner = sizes[1] * sizes[2]
    expected = np.arange(nodes * 8).reshape(-1, sizes[1], sizes[2])
    np.testing.assert_array_equal(ids(mesh), expected)
    rows = np.reshape(slices.slices_of(mesh), (-1, inner))
    assert all(len(set(row)) == 1 for row in rows.tolist())
    assert slices.crossing(mesh) == [] and slices.crossing_warning(mesh, 10**9) == ""


@pytest.mark.parametrize(
    "sizes, expected",
    [((1, 16, 1), (1, 2, 8, 1)), ((1, 2, 8), (1, 2, 1, 8)), ((2, 16, 1), (2, 2, 8, 1))],
)
def test_fsdp_crosses_slices_by_an_axis_of_its_own(sizes, expected):
    nodes = 2 * sizes[0]
    mesh = sharding.make_mesh(*sizes, devices=shuffled(gpus(nodes, 8)))
    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == ("data", "slices", "fsdp", "expert")
    np.testing.assert_array_equal(ids(mesh).ravel(), np.arange(nodes * 8))
    assert slices.crossing(mesh) == [] and slices.crossing_warning(mesh, 10**9) == ""


@pytest.mark.parametrize("sizes, crossing", [((1, 1, 16), "expert=16")])
def test_axes_that_must_cross_are_built_and_their_price_is_told(sizes, crossing):
    mesh = sharding.make_mesh(*sizes, devices=shuffled(gpus(2, 8)))
    np.testing.assert_array_equal(ids(mesh).ravel(), np.arange(16))
    told = slices.crossing_warning(mesh, 4_640_000_000)
    assert told.startswith(f"the mesh's {crossing} cross slices of 8 devices")
    assert "4.64 GB of weights" in told and "divides 8" in told


def test_all_of_one_node_is_as_before():
    mesh = sharding.make_mesh(16, 1, 1, devices=gpus(2, 8))
    assert mesh.shape == {"data": 16, "fsdp": 1, "expert": 1}
    assert slices.slices_of(mesh) == (0,) * 8 + (1,) * 8
    one = sharding.make_mesh(-1, 4, 1)
    np.testing.assert_array_equal(ids(one), np.arange(8).reshape(2, 4, 1))
    assert slices.slices_of(one) == (0,) * 8 and slices.described() == ""


def test_nodes_of_different_sizes():
    """A node with four GPUs beside one with eight: fsdp=4 fits both, fsdp=6 crosses by twos."""
    devices = gpus(1, 8) + [
        d.__class__(d.id, 1, 1, d.platform, d.device_kind) for d in gpus(1, 4, first_id=8)
    ]
    mesh = sharding.make_mesh(-1, 4, 1, devices=devices)
    assert mesh.shape["data"] == 3 and slices.crossing(mesh) == []
    crossing = sharding.make_mesh(-1, 6, 1, devices=devices)
    assert crossing.shape == {"data": 2, "slices": 3, "fsdp": 2, "expert": 1}
    assert slices.crossing(crossing) == []
    expert = sharding.make_mesh(-1, 1, 6, devices=devices)
    assert "divides 4" in slices.crossing_warning(expert, 0)


def test_tpu_slices_keep_the_order_of_their_links():
    devices = tpus(2)
    mesh = sharding.make_mesh(-1, 4, 1, devices=devices)
    one = mesh_utils.create_device_mesh((4, 4, 1), devices[:16], allow_split_physical_axes=True)
    np.testing.assert_array_equal(ids(mesh)[:4], np.vectorize(lambda device: device.id)(one))
    assert slices.slices_of(mesh) == (0,) * 16 + (1,) * 16
    # Neighbours along fsdp are joined by a link.
    for row in mesh.devices[:, :, 0]:
        for a, b in zip(row, row[1:], strict=False):
            assert a.slice_index == b.slice_index
            steps = [
                min(abs(i - j), 4 - abs(i - j)) for i, j in zip(a.coords, b.coords, strict=True)
            ]
            assert sum(steps) == 1


def test_the_log_tells_the_slices(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: gpus(4, 8))
    assert slices.described() == ", 4 slices of 8"


def test_gpus_that_are_only_compiled_for():
    """The compiler's model gives them no slice_index, but coordinates that begin with it."""
    devices = [
        dataclasses.replace(d, slice_index=0, coords=(d.id // 8, 0, d.id % 8)) for d in gpus(2, 8)
    ]
    assert slices.slices_of(sharding.make_mesh(-1, 8, 1, devices=devices)) == (0,) * 8 + (1,) * 8
