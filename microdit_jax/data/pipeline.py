"""The order in which training sees records: a pure function of (seed, step).

Every source is shuffled anew each epoch and repeated, the sources are mixed by weight, and the
batches are dealt out to processes. So the global batch of a step is the same on one host and on
many, and the step number is the whole state: a run resumes on any number of hosts. (Grain's own
iterator checkpoint pins the number of processes, so it is not used.)

Grain puts numbers in order; records are read once a batch of numbers is there. Carried through
Grain's layers one by one, each record costs three times as much (160 and 50 microseconds). A single
source of few records has its order made in memory, a batch at a time.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Generator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int

from microdit_jax.errors import UserError

SMALL = 2**20  # records, whose order takes 8 MB

Record = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Random access to records, dictionaries of numpy arrays and numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@runtime_checkable
class RowSource(Source, Protocol):
    """A source that reads many records at once in less time than one by one."""

    def rows(self, indices: Int[np.ndarray, " n"], /) -> dict[str, np.ndarray]:
        """The arrays and numbers of these records, each name's stacked."""
        ...


def rows(
    source: Source, indices: Int[np.ndarray, " n"], names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """The records of these indices, each of `names` (by default all) stacked."""
    if isinstance(source, RowSource):
        found = source.rows(indices)
        return {name: found[name] for name in names or found}
    records = [source[index] for index in indices.tolist()]
    return {name: np.stack([r[name] for r in records]) for name in names or records[0]}


def make_dataset(
    sources: Sequence[Source],
    weights: Sequence[float | int] | None = None,
    *,
    seed: int,
    batch_size: int,
    caption_drop: float | int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """The endless dataset of this process's batches: `dataset[step]` is its part of that step.

    Process i holds the i-th of `process_count` equal, consecutive parts of each global batch, so
    the parts put together in process order are the batch that a single process would have seen.

    Args:
      sources: where records come from; to each record is added "keep_caption", float32 0 or 1.
      weights: expected share of each source, in any unit; by default their sizes.
      seed: decides order and dropped captions, 0 to 2**32 - 1.
      batch_size: of all processes together.
      caption_drop: probability that a record's caption is to be replaced by the empty one.
    Raises:
      UserError: if a value is out of range or the batch does not divide by the processes.
    """
    weights = [len(source) for source in sources] if weights is None else list(weights)
    _check(sources, weights, seed, batch_size, caption_drop, process_index, process_count)
    # One independent seed each; Grain's shuffle takes seed + epoch, so neighbours would overlap.
    *shuffle_seeds, drop_seed = np.random.SeedSequence(seed).generate_state(len(sources) + 1)
    ends = np.cumsum([0, *map(len, sources)]).tolist()
    part = batch_size // process_count
    if len(sources) == 1 and ends[-1] <= SMALL:
        numbers = grain.MapDataset.source(_SmallOrder(ends[-1], int(shuffle_seeds[0]), part))
    else:
        streams = [
            grain.MapDataset.range(*between).seed(int(shuffle_seed)).shuffle().repeat()
            for between, shuffle_seed in zip(itertools.pairwise(ends), shuffle_seeds, strict=True)
        ]
        numbers = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)
        numbers = numbers.batch(part, drop_remainder=True)
    reader = _Reader(sources, ends, int(drop_seed), caption_drop)
    return numbers.map_with_index(reader)[process_index::process_count]


def batches(
    dataset: grain.MapDataset, start_step: int, *, threads: int = 1, ahead: int = 4
) -> Generator[dict[str, np.ndarray], None, None]:
    """Batches of steps start_step, start_step + 1, ... read ahead by threads (no processes).

    Args:
      dataset: from `make_dataset`.
      start_step: the step whose batch comes first; resuming needs nothing else.
      threads: that read; batches arrive in order whatever their number. With 0 the caller reads,
        which is quickest where records are in memory.
      ahead: batches that threads keep ready.
    """
    ahead = max(ahead, threads) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    iterator = iter(dataset.to_iter_dataset(options))
    # Grain's name for the index of the next element, here the step
    iterator.set_state({"next_index": start_step})
    with contextlib.closing(iterator):  # ends the threads when the caller stops or fails
        yield from iterator


class _SmallOrder(Sequence[np.ndarray]):
    """The numbers of each batch, 0 to size - 1 in a new order each epoch, whole epochs in memory.

    What Grain's shuffle, repeat and batch give without memory, one number at a time through several
    calls each: 1.3 ms for a batch of 64, a per cent of a small network's step on a CPU.
    """

    def __init__(self, size: int, seed: int, batch_size: int):
        self._size, self._seed, self._batch_size = size, seed, batch_size
        self._order = functools.lru_cache(maxsize=2)(self._epoch)  # a batch may be of two

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size  # as of Grain's endless datasets

    def __getitem__(self, batch: int) -> np.ndarray:
        first = batch * self._batch_size
        epochs, places = np.divmod(np.arange(first, first + self._batch_size), self._size)
        return np.concatenate(
            [self._order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
        )

    def _epoch(self, epoch: int) -> Int[np.ndarray, " size"]:
        # Raw numbers: these NumPy keeps from version to version, permutations it may change.
        drawn = np.random.Philox(key=self._seed, counter=[0, epoch, 0, 0]).random_raw(self._size)
        return np.argsort(drawn, kind="stable")


class _Reader:
    """Reads the records of a batch from their numbers, counted through all sources."""

    def __init__(
        self, sources: Sequence[Source], ends: list[int], drop_seed: int, caption_drop: float | int
    ):
        self._sources, self._ends = sources, ends
        self._drop_seed, self._caption_drop = drop_seed, caption_drop

    def __call__(self, batch: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        owners = np.searchsorted(self._ends, numbers, side="right") - 1
        parts, order = [], []
        for owner in np.unique(owners).tolist():
            (places,) = np.nonzero(owners == owner)
            parts.append(rows(self._sources[owner], numbers[places] - self._ends[owner]))
            order.append(places)
        found = parts[0]
        if len(parts) > 1:
            back = np.argsort(np.concatenate(order))
            found = {name: np.concatenate([part[name] for part in parts])[back] for name in found}
        # By the record's place in the run, one block of four numbers each, of which one is used:
        # so the size of the parts that processes read does not matter.
        stream = np.random.Philox(key=self._drop_seed, counter=batch * len(numbers))
        chance = np.random.Generator(stream).random((len(numbers), 4))[:, 0]
        return found | {"keep_caption": (chance >= self._caption_drop).astype(np.float32)}


def _check(
    sources: Sequence[Source],
    weights: Sequence[float | int],
    seed: int,
    batch_size: int,
    caption_drop: float | int,
    process_index: int,
    process_count: int,
) -> None:
    sizes = [len(source) for source in sources]
    if not sizes or 0 in sizes:
        raise UserError(
            f"expected one or more data sources with records, found sources of {sizes} records: "
            f"check the data folders"
        )
    if len(weights) != len(sizes) or min(weights) <= 0:
        raise UserError(
            f"expected a positive weight for each of {len(sizes)} data sources, found {weights}: "
            f"leave a source out rather than weighting it 0"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"expected a data seed of 0 to 2**32 - 1, found {seed}: choose another")
    if not 0 <= caption_drop <= 1:
        raise UserError(
            f"expected a caption drop probability in [0, 1], found {caption_drop}: 0.1 is usual"
        )
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"expected a batch size in multiples of {process_count} processes, found "
            f"{batch_size}: change the batch size or the number of hosts"
        )
    if not 0 <= process_index < process_count:
        raise UserError(
            f"expected a process index of 0 to {process_count - 1}, found {process_index}: "
            f"pass jax.process_index() and jax.process_count()"
        )
