"""Prefetching: order, errors, how far it reads ahead, and threads that end."""

import itertools
import logging
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from microdit_jax.data.pipeline import batches, make_dataset
from microdit_jax.data.prefetch import Prefetch


class Numbers:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"x": np.full(3, index, np.float32)}


def test_batches_arrive_in_order_on_the_devices():
    dataset = make_dataset([Numbers()], seed=0, batch_size=16, caption_drop=0.0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    before = set(threading.enumerate())
    with Prefetch(batches(dataset, 5), lambda b: jax.device_put(b, sharding)) as found:
        for step in range(5, 25):
            batch = next(found)
            assert batch["x"].sharding == sharding
            np.testing.assert_array_equal(batch["x"], dataset[step]["x"])
    deadline = time.monotonic() + 10
    while not before.issuperset(threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert before.issuperset(threading.enumerate())


def test_the_end_stays_the_end():
    with Prefetch(iter(range(4)), lambda x: x) as found:
        assert list(found) == [0, 1, 2, 3]
        with pytest.raises(StopIteration):
            next(found)


def test_no_more_than_asked_for_is_read_ahead():
    taken = []

    def counted():
        for i in itertools.count():
            taken.append(i)
            yield i

    with Prefetch(counted(), lambda x: x, ahead=2) as found:
        next(found)
        time.sleep(0.2)
        assert len(taken) == 4  # one handed over, two ready, one in hand


@pytest.mark.parametrize("stage", ["reading", "putting"])
def test_errors_reach_the_caller_again_and_again(stage):
    def broken(*_):
        raise OSError("the disk is gone")

    source = map(broken, [1]) if stage == "reading" else iter([1])
    with Prefetch(source, broken) as found:
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(found)


def test_a_stuck_stage_is_named(caplog):
    def stuck():
        time.sleep(0.5)
        yield 1

    with caplog.at_level(logging.WARNING), Prefetch(stuck(), lambda x: x, warn_after=0.2) as found:
        assert next(found) == 1
    assert "the loader is reading" in caplog.text
