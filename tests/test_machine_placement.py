"""Batches of one size: every row once, in order, whatever fills the last batch up."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from microdit_jax import sharding
from microdit_jax.machine.placement import full_batches, map_batches, round_up


@pytest.mark.parametrize("count, size", [(0, 4), (1, 4), (4, 4), (7, 4), (8, 4), (5, 3)])
def test_every_row_is_new_once(count, size):
    batches = list(full_batches(count, size))
    assert all(len(batch.rows) == size for batch in batches)
    new = [row for batch in batches for row in batch.rows[: batch.count]]
    assert new == list(range(count))
    # What fills a batch up are rows of the same batch.
    assert all(set(batch.rows) == set(batch.rows[: batch.count]) for batch in batches)


def test_sizes_are_rounded_up():
    assert [round_up(size, 8) for size in (1, 8, 9)] == [8, 8, 16]


@pytest.mark.parametrize("devices", [1, 8])
def test_a_function_of_rows_over_all_of_them(devices):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    params = jax.device_put(np.float32(3), NamedSharding(mesh, P()))
    shapes = []

    @jax.jit
    def function(params, x, y):
        shapes.append(x.shape)  # only while it is traced
        return {"sum": params * x + y, "x": x}

    items = np.arange(11, dtype=np.float32)
    prepared = []

    def prepare(part):
        prepared.append(len(part))
        return part, 10 * part

    found = map_batches(function, params, items, prepare, size=4)
    np.testing.assert_array_equal(found["sum"], 13 * items)
    np.testing.assert_array_equal(found["x"], items)
    assert shapes == [(round_up(4, devices),)] and sum(prepared) == 11
