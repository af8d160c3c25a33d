"""Order in which training sees records: a pure function of (seed, step).

Every source is shuffled anew each epoch and repeated, the sources are mixed by weight, and each
batch is split over the processes. The global batch of a step is therefore the same on any number
of hosts, and the step number is the whole state: a run resumes on any number of hosts. (Grain's own
iterator checkpoint is tied to the number of processes, so it is not used.)

The pipeline orders record numbers, and reads the records of a whole batch of numbers at once:
records that pass through Grain's layers one by one cost three times as much (160 against 50
microseconds each). A single source of up to a million records has its order made in memory
(`python -m microdit_jax.xla.bench --what=loader` compares both); mixed and larger ones use Grain.
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

MAX_IN_MEMORY = 2**20  # records of a source whose order, 8 MB, is made in memory

Record = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Random access to records: dictionaries of NumPy arrays, numbers and texts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@runtime_checkable
class RowSource(Source, Protocol):
    """A source that reads many records at once in less time than one by one."""

    def rows(self, indices: Int[np.ndarray, " n"], /) -> dict[str, np.ndarray]:
        """Reads these records; each array and number is stacked over the records."""
        ...


@runtime_checkable
class RecordSource(Source, Protocol):
    """A source of which many records are read at once, such as one that waits for a network."""

    def records(self, indices: Int[np.ndarray, " n"], /) -> list[Record]:
        """Reads these records."""
        ...


def rows(
    source: Source, indices: Int[np.ndarray, " n"], names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads records; each of `names` (by default all) is stacked over the records."""
    if isinstance(source, RowSource):
        found = source.rows(indices)
        return {name: found[name] for name in names or found}
    if isinstance(source, RecordSource):
        records = source.records(indices)
    else:
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
    max_in_memory: int = MAX_IN_MEMORY,
) -> grain.MapDataset:
    """Makes the endless dataset of one process's batches; `dataset[step]` is its part of a step.

    Process i reads the i-th of `process_count` equal, consecutive parts of each global batch. Put
    together in process order, they are the batch that a single process would have read.

    Args:
      sources: hold the records; "keep_caption", float32 0 or 1, is added to each record.
      weights: expected share of each source, in any unit; by default their sizes.
      seed: decides order and dropped captions, 0 to 2**32 - 1.
      batch_size: records of a step, of all processes together.
      caption_drop: probability that "keep_caption" is 0, so that the empty caption is trained on.
      max_in_memory: records up to which a single source has its order made in memory; the order
        differs from Grain's, so a run must keep it.
    Raises:
      UserError: a value is out of range, or the batch does not divide by the processes.
    """
    weights = [len(source) for source in sources] if weights is None else list(weights)
    _check(sources, weights, seed, batch_size, caption_drop, process_index, process_count)
    # Independent seeds: Grain shuffles with seed + epoch, so seeds n and n + 1 would share epochs.
    *shuffle_seeds, drop_seed = np.random.SeedSequence(seed).generate_state(len(sources) + 1)
    ends = np.cumsum([0, *map(len, sources)]).tolist()
    part = batch_size // process_count
    if len(sources) == 1 and ends[-1] <= max_in_memory:
        numbers = grain.MapDataset.source(_OrderInMemory(ends[-1], int(shuffle_seeds[0]), part))
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
    """Yields the batches of steps start_step, start_step + 1, ..., read ahead by threads.

    Args:
      dataset: from `make_dataset`.
      start_step: the step of the first batch; resuming needs nothing else.
      threads: how many read; batches arrive in order for any number. With 0 the caller reads,
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


class _OrderInMemory(Sequence[np.ndarray]):
    """Record numbers of each batch: 0 to size - 1, permuted anew each epoch.

    Grain's shuffle, repeat and batch give the same kind of order without memory, but one number at
    a time through several calls each: 2.6 ms for a batch of 64 against 0.2 ms, a per cent or two of
    a small network's step on a CPU.
    """

    def __init__(self, size: int, seed: int, batch_size: int):
        self._size, self._seed, self._batch_size = size, seed, batch_size
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)  # a batch may span two

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size  # as long as Grain's endless datasets

    def __getitem__(self, batch: int) -> np.ndarray:
        first = batch * self._batch_size
        epochs, positions = np.divmod(np.arange(first, first + self._batch_size), self._size)
        return np.concatenate(
            [
                self._permutation(epoch)[positions[epochs == epoch]]
                for epoch in np.unique(epochs).tolist()
            ]
        )

    def _permute(self, epoch: int) -> Int[np.ndarray, " size"]:
        # NumPy promises the same raw numbers in every version, but not the same permutations.
        noise = np.random.Philox(key=self._seed, counter=[0, epoch, 0, 0]).random_raw(self._size)
        return np.argsort(noise, kind="stable")


class _Reader:
    """Reads the records of a batch by their numbers, which count through all sources."""

    def __init__(
        self, sources: Sequence[Source], ends: list[int], drop_seed: int, caption_drop: float | int
    ):
        self._sources, self._ends = sources, ends
        self._drop_seed, self._caption_drop = drop_seed, caption_drop

    def __call__(self, batch: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        owners = np.searchsorted(self._ends, numbers, side="right") - 1
        parts, order = [], []
        for owner in np.unique(owners).tolist():
            (positions,) = np.nonzero(owners == owner)
            parts.append(rows(self._sources[owner], numbers[positions] - self._ends[owner]))
            order.append(positions)
        found = parts[0]
        if len(parts) > 1:
            inverse = np.argsort(np.concatenate(order))
            found = {
                name: np.concatenate([part[name] for part in parts])[inverse] for name in found
            }
        # The n-th record of the run uses the n-th Philox block (of its four numbers, one), so the
        # dropped captions do not depend on how a batch is split over processes.
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
