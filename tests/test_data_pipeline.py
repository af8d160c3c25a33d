"""The data order: a pure function of (seed, step), whatever the number of processes."""

import itertools
import threading
import time

import numpy as np
import pytest

from microdit_jax.data.pipeline import batches, make_dataset
from microdit_jax.errors import UserError


class Numbers:
    """Records that say which source and index they are."""

    def __init__(self, size: int, tag: int = 0):
        self.size, self.tag = size, tag

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {
            "latents": np.full((2, 2, 1), self.tag + index, np.float32),
            "caption_latents": np.full((3, 4), -index, np.float32),
            "index": np.int32(self.tag + index),
        }


def dataset(process_index=0, process_count=1, **changes):
    arguments = {"seed": 18, "batch_size": 8, "caption_drop": 0.1} | changes
    sources = arguments.pop("sources", [Numbers(50)])
    return make_dataset(
        sources, **arguments, process_index=process_index, process_count=process_count
    )


def take(iterator, count):
    found = list(itertools.islice(iterator, count))
    iterator.close()
    return {key: np.stack([batch[key] for batch in found]) for key in found[0]}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key])


def test_records_keep_their_parts_together():
    batch = dataset()[5]
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "latents": ((8, 2, 2, 1), np.float32),
        "caption_latents": ((8, 3, 4), np.float32),
        "keep_caption": ((8,), np.float32),
        "index": ((8,), np.int32),
    }
    np.testing.assert_array_equal(batch["latents"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["caption_latents"][:, 0, 0], -batch["index"])


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_process_count(process_count):
    """Mixed by weight, shuffled, captions dropped; the processes resume where one process ended."""
    mixed = {"sources": [Numbers(50), Numbers(30, tag=1000)], "weights": [1.0, 3.0]}
    one = dataset(**mixed)
    many = [dataset(i, process_count, **mixed) for i in range(process_count)]
    for step in range(201):
        parts = [part[step] for part in many]
        assert all(len(part["index"]) == 8 // process_count for part in parts)
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        equal(joined, one[step])
    start = int(np.random.default_rng(process_count).integers(1, 200))
    for part in many:
        resumed = take(batches(part, start), 3)
        equal(resumed, {key: np.stack([part[start + i][key] for i in range(3)]) for key in resumed})


def test_resume_at_any_step_equals_the_uninterrupted_run():
    whole = take(batches(dataset(), 0), 40)
    for start in (1, 17, 39):
        resumed = take(batches(dataset(), start, threads=3, ahead=2), 40 - start)
        equal(resumed, {key: value[start:] for key, value in whole.items()})
    # on two processes instead of one
    resumed = take(batches(dataset(1, 2), 30), 10)
    equal(resumed, {key: value[30:, 4:] for key, value in whole.items()})


@pytest.fixture(params=["in memory", "by Grain"])
def order(request):
    """Arguments of `make_dataset`."""
    return {"max_in_memory": 0} if request.param == "by Grain" else {}


def test_every_epoch_covers_each_record_once_in_a_new_order(order):
    found = take(batches(dataset(batch_size=10, **order), 0), 20)["index"].reshape(4, 50)
    for epoch in found:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
    assert len({tuple(epoch) for epoch in found}) == 4
    assert not any(np.array_equal(epoch, np.arange(50)) for epoch in found)
    for size in (8, 64, 120):  # batches of parts of epochs, and of more than one
        other = take(batches(dataset(batch_size=size, **order), 0), 200 // size)["index"].ravel()
        np.testing.assert_array_equal(other, found.ravel()[: len(other)])


def test_seeds_give_different_orders_and_the_same_seed_the_same(order):
    orders = [
        take(batches(dataset(seed=seed, **order), 0), 12)["index"].ravel()
        for seed in (18, 18, 19, 20)
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    # Grain numbers epochs seed, seed + 1, ...: epochs of neighbouring seeds must not be the same
    epochs = {tuple(order[start : start + 48]) for order in orders[1:] for start in (0, 50)}
    assert len(epochs) == 6 and not np.array_equal(orders[1][50:96], orders[2][:46])


def test_sources_are_mixed_by_weight_and_by_size_without_one():
    sources = [Numbers(300), Numbers(100, tag=1000)]
    by_size = take(batches(dataset(sources=sources), 0), 50)["index"].ravel()
    assert len(set(by_size)) == 400  # one epoch of both
    weighted = take(batches(dataset(sources=sources, weights=[1, 3]), 0), 50)["index"].ravel()
    assert np.sum(weighted >= 1000) == 300


def test_captions_are_dropped_at_the_rate_and_anew_each_epoch():
    keep = take(batches(dataset(sources=[Numbers(500)], batch_size=100), 0), 100)
    dropped = keep["keep_caption"] == 0
    assert set(np.unique(keep["keep_caption"])) == {0.0, 1.0}
    assert 0.09 < dropped.mean() < 0.11  # 10,000 draws: 3.3 standard deviations
    epochs = [set(keep["index"][i : i + 5][dropped[i : i + 5]]) for i in range(0, 100, 5)]
    assert len({frozenset(epoch) for epoch in epochs}) == 20
    again = take(batches(dataset(sources=[Numbers(500)], batch_size=100), 0), 100)
    equal(again, keep)
    for rate in (0.0, 1.0):
        assert np.all(dataset(caption_drop=rate)[3]["keep_caption"] == 1.0 - rate)


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    iterator = batches(dataset(), 0, threads=2)
    next(iterator)
    assert not before.issuperset(threading.enumerate())
    iterator.close()
    deadline = time.monotonic() + 10
    while not before.issuperset(threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert before.issuperset(threading.enumerate())


def test_an_error_in_a_source_reaches_the_caller():
    class Broken(Numbers):
        def __getitem__(self, index):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(batches(dataset(sources=[Broken(5)]), 0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sources": []}, "one or more data sources"),
        ({"sources": [Numbers(5), Numbers(0)]}, r"sources of \[5, 0\] records"),
        ({"weights": [1.0, 1.0]}, "a positive weight for each of 1"),
        ({"weights": [0.0]}, "a positive weight"),
        ({"seed": -1}, "data seed"),
        ({"batch_size": 0}, "batch size"),
        ({"batch_size": 6, "process_count": 4}, "multiples of 4 processes, found 6"),
        ({"process_index": 2, "process_count": 2}, "process index of 0 to 1, found 2"),
        ({"caption_drop": 1.5}, r"in \[0, 1\], found 1.5"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        dataset(**changes)


class Rows(Numbers):
    """The same records, also read many at a time."""

    def rows(self, indices):
        return {
            name: np.stack([self[i][name] for i in indices.tolist()])
            for name in ("latents", "caption_latents", "index")
        }


@pytest.mark.parametrize("threads", [0, 2])
def test_reading_rows_and_reading_threads_change_nothing(threads):
    one_by_one = [Numbers(7), Numbers(50, 100), Numbers(20, 1000)]
    mixed = [Rows(7), Numbers(50, 100), Rows(20, 1000)]
    expected = take(batches(dataset(sources=one_by_one), 0), 12)
    found = take(batches(dataset(sources=mixed), 0, threads=threads), 12)
    assert len(set(np.digitize(found["index"].ravel(), [100, 1000]))) == 3
    equal(found, expected)
