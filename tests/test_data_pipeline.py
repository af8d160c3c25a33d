"""The data order: a pure function of (seed, step), whatever the number of processes."""

import datetime
import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


# ------------------------------------------------------------------ any sources, batches and seeds
FEW = settings(max_examples=25, deadline=datetime.timedelta(seconds=20), derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)
IN_MEMORY = st.sampled_from([0, 2**20])


def sources(sizes):
    return [Numbers(size, 1000 * number) for number, size in enumerate(sizes)]


@FEW
@given(st.integers(1, 60), st.integers(1, 25), SEEDS, IN_MEMORY)
def test_each_epoch_is_a_permutation(size, batch_size, seed, max_in_memory):
    dataset = make_dataset(
        sources([size]),
        seed=seed,
        batch_size=batch_size,
        caption_drop=0.1,
        max_in_memory=max_in_memory,
    )
    steps = -(-3 * size // batch_size)
    found = np.concatenate([dataset[step]["index"] for step in range(steps)])[: 3 * size]
    for epoch in found.reshape(3, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


@FEW
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 6),
    SEEDS,
    st.lists(st.integers(0, 500), min_size=1, max_size=4),
    IN_MEMORY,
)
def test_a_step_decides_its_batch_whoever_reads_it(
    parts, share, processes, seed, steps, max_in_memory
):
    sizes, weights = zip(*parts, strict=True)
    arguments = {
        "seed": seed,
        "batch_size": share * processes,
        "caption_drop": 0.5,
        "max_in_memory": max_in_memory,
    }
    one = make_dataset(sources(sizes), weights, **arguments)
    expected = [one[step] for step in steps]
    many = [
        make_dataset(sources(sizes), weights, **arguments, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for step, batch in reversed(list(zip(steps, expected, strict=True))):  # in any order
        found = [dataset[step] for dataset in many]
        for name, values in batch.items():
            np.testing.assert_array_equal(
                np.concatenate([part[name] for part in found]), values, strict=True
            )


@settings(FEW, max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), SEEDS)
def test_sources_are_mixed_by_their_weights(weights, seed):
    batch_size = 10 * sum(weights)
    dataset = make_dataset(
        sources([7] * len(weights)), weights, seed=seed, batch_size=batch_size, caption_drop=0
    )
    counts = np.bincount(dataset[3]["index"] // 1000, minlength=len(weights))
    assert np.abs(counts - 10 * np.array(weights)).max() <= 1


def test_each_record_has_a_chance_of_its_own():
    """Neither a batch as a whole, nor the same records each time, nor every n-th."""
    dataset = make_dataset(sources([500]), seed=3, batch_size=20, caption_drop=0.3)
    keep = np.stack([dataset[step]["keep_caption"] for step in range(1000)])
    assert set(np.unique(keep)) == {0, 1}
    assert abs(keep.mean() - 0.7) < 0.02  # four standard deviations: 0.013
    assert 0.08 < keep.mean(axis=1).std() < 0.125  # a binomial's, sqrt(0.3 * 0.7 / 20) = 0.102
    assert np.abs(keep.mean(axis=0) - 0.7).max() < 0.08
    for lag in range(1, 41):  # within a batch and into the next two
        pairs = np.corrcoef(keep.ravel()[lag:], keep.ravel()[:-lag])[0, 1]
        assert abs(pairs) < 0.04, lag


def test_the_order_of_runs_that_have_begun_stays():
    """Recorded; another order would change the numbers of every run that resumes."""
    dataset = make_dataset(sources([50]), seed=18, batch_size=8, caption_drop=0.3)
    for step, indices, keep in (
        (0, [38, 21, 35, 31, 40, 45, 49, 11], [1, 0, 1, 0, 1, 1, 1, 1]),
        (6, [9, 47, 20, 25, 29, 9, 37, 24], [1, 1, 1, 0, 0, 0, 1, 1]),
        (100, [29, 34, 5, 39, 11, 33, 10, 25], [1, 1, 1, 1, 1, 1, 1, 1]),
    ):
        assert dataset[step]["index"].tolist() == indices
        assert dataset[step]["keep_caption"].tolist() == keep
