"""Reads MosaicML MDS datasets: random access to samples, without torch.

Shards on a disk are memory maps. Those of a URL are kept whole in a cache; or, where they are read
in random order and are more than it holds, each record is read by a range of its own.
"""

import bisect
import itertools
import os
import struct
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from microdit_jax.data import compression, mds_encodings
from microdit_jax.data.mapped import map_file
from microdit_jax.data.mds_format import (
    INDEX,
    Shard,
    check_file_hashes,
    check_header,
    header_bytes,
    read_index,
)
from microdit_jax.data.shard_files import ShardFiles
from microdit_jax.errors import UserError
from microdit_jax.files.ranges import Range, RangeReader

# Shards kept mapped by all readers together; the kernel allows 65,530 maps a process.
_MAX_OPEN = 32_768
_AT_ONCE = 8  # shards fetched at a time, each held in memory until it is written
_readers: "weakref.WeakSet[MdsReader]" = weakref.WeakSet()


class MdsReader:
    """Random access to the samples of one MDS dataset; safe in threads.

    Attributes:
      columns: name -> encoding, the same for all shards, in stored (sorted) order.
      way: how a dataset at a URL is read and why, in words; "" for a local one.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        cache: str | os.PathLike | None = None,
        cache_bytes: int = 100 * 10**9,
        check_hashes: bool = False,
        shuffled: bool = False,
    ):
        """Reads the index only; shards are opened when first used.

        Args:
          root: the folder or fsspec URL with index.json.
          cache, cache_bytes: see `ShardFiles`.
          check_hashes: compare each file with the index's hashes when it is first opened.
          shuffled: records of a URL will be asked for in random order: where the dataset is larger
            than the cache, or there is none, read single records and keep nothing.
        Raises:
          UserError: the index is missing, damaged, or of a format this cannot read.
        """
        self._files = ShardFiles(
            root, cache=cache, cache_bytes=cache_bytes, on_evict=self._forget_file
        )
        self.shards = read_index(self._files)
        self.columns = self.shards[0].columns if self.shards else {}
        self._encodings = {name: mds_encodings.parse(e) for name, e in self.columns.items()}
        self._sizes = struct.Struct(f"<{sum(e.size is None for e in self._encodings.values())}I")
        self._starts = [0, *itertools.accumulate(shard.samples for shard in self.shards)]
        self._check_hashes = check_hashes
        if check_hashes and not all(shard.raw.hashes for shard in self.shards):
            raise UserError(
                f"expected hashes in {self._files.location(INDEX)}, found none; read the dataset "
                "without checking them, or write it with hashes"
            )
        self._ranges: RangeReader | None = None
        self._offsets: dict[int, np.ndarray] = {}  # of shards whose records are read by ranges
        self.way = ""
        if not self._files.is_local:
            by_ranges, self.way = self._choose(cache_bytes, shuffled)
            if by_ranges:
                self._ranges = RangeReader(self._files.root)
            else:
                self._files.check_cache()
        self._views: dict[int, memoryview] = {}
        _readers.add(self)
        self._number_of = {shard.raw.name: i for i, shard in enumerate(self.shards)}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the decoded sample; images stored as JPEG or PNG files stay bytes.

        Raises:
          UserError: the shard is missing or damaged; it and the sample are named.
          IndexError: no such sample.
        """
        raw, sample = self.raw(index), {}
        for name, encoding in self._encodings.items():
            try:
                sample[name] = encoding.decode(raw[name])
            except (ValueError, KeyError, IndexError, TypeError, ArithmeticError) as error:
                raise UserError(
                    f"expected {self.columns[name]} in column {name} of {self.where(index)}, could "
                    f"not decode its {len(raw[name])} bytes ({error}); copy the shard again"
                ) from error
        return sample

    def raw(self, index: int) -> dict[str, memoryview]:
        """Returns views of each column's bytes in the mapped file; raises as `[]` does."""
        number = self._shard_of(index)
        if self._ranges is not None:
            return self.raws([index])[0]
        view = self._views.get(number)
        if view is None:
            view = self._open(number)
        self._files.check_uncut(self.shards[number].raw.name, len(view))
        begin, end = struct.unpack_from("<2I", view, 4 + 4 * (index - self._starts[number]))
        return self._columns_of(index, view[begin:end])

    def raws(self, indices: Sequence[int]) -> list[dict[str, memoryview]]:
        """Returns what `raw` does for each; of a URL many ranges or shards are fetched at a time.

        Raises:
          BucketError: a record cannot be read; otherwise as `raw`.
        """
        numbers = [self._shard_of(index) for index in indices]
        if self._ranges is None:
            missing = sorted({n for n in numbers if n not in self._views})
            if len(missing) > 1 and not self._files.is_local:
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    list(pool.map(self._open, missing))
            return [self.raw(index) for index in indices]
        self._read_offsets(sorted({n for n in numbers if n not in self._offsets}))
        ranges = []
        for index, number in zip(indices, numbers, strict=True):
            at = index - self._starts[number]
            begin, end = self._offsets[number][at : at + 2].tolist()
            ranges.append(Range(self.shards[number].raw.name, begin, end))
        records = self._ranges.read(ranges)
        return [
            self._columns_of(index, memoryview(data))
            for index, data in zip(indices, records, strict=True)
        ]

    def where(self, index: int) -> str:
        """ "sample 7 of FILE", for messages."""
        number = bisect.bisect_right(self._starts, index) - 1
        file = self._files.location(self.shards[number].raw.name)
        return f"sample {index - self._starts[number]} of {file}"

    def _shard_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return bisect.bisect_right(self._starts, index) - 1

    def _columns_of(self, index: int, sample: memoryview) -> dict[str, memoryview]:
        """Views the columns of a sample's bytes; raises UserError if they do not fit."""
        columns, at = {}, self._sizes.size
        if at <= len(sample):
            varying = iter(self._sizes.unpack_from(sample))
            for name, encoding in self._encodings.items():
                size = next(varying) if encoding.size is None else encoding.size
                columns[name] = sample[at : at + size]
                at += size
        if at != len(sample):
            raise UserError(
                f"expected {len(sample)} bytes in {self.where(index)}, found columns of "
                f"{at} bytes; the shard is damaged: copy it again"
            )
        return columns

    def _choose(self, cache_bytes: int, shuffled: bool) -> tuple[bool, str]:
        """Decides whether records of a URL are read by ranges; returns the words for it too."""
        size = sum(shard.raw.size for shard in self.shards)
        room = min(cache_bytes, self._files.room)
        words = f"{len(self):,} records, {size / 1e9:,.1f} GB in {len(self.shards):,} shards"
        if not shuffled or size <= room:
            return False, f"{words}, kept in the cache"
        less = f"more than the cache holds ({room / 1e9:,.1f} GB)" if room else "without a cache"
        if self._check_hashes or any(shard.packed is not None for shard in self.shards):
            what = "hashes are checked" if self._check_hashes else "shards are compressed"
            return False, (
                f"{words}, {less}: its {what}, so a whole shard is fetched for each record that is "
                "not there; make data.cache_bytes larger, or write it uncompressed "
                "(python -m microdit_jax.prepare.reformat --to=mds)"
            )
        return True, f"{words}, {less}: single records are read"

    def _read_offsets(self, numbers: Sequence[int]) -> None:
        """Reads where the samples of these shards begin, and checks it."""
        assert self._ranges is not None
        shards = [self.shards[n] for n in numbers]
        heads = self._ranges.read([Range(s.raw.name, 0, header_bytes(s)) for s in shards])
        for number, shard, head in zip(numbers, shards, heads, strict=True):
            where = self._files.location(shard.raw.name)
            check_header(where, shard, memoryview(head), shard.raw.size)
            self._offsets[number] = np.frombuffer(head, "<u4", shard.samples + 1, offset=4).copy()

    def _open(self, number: int) -> memoryview:
        shard = self.shards[number]
        where = self._files.location(shard.raw.name)
        try:
            with self._open_raw(shard) as file:
                view = map_file(file)
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"expected a shard in {where}, could not open it ({error}); copy it again"
            ) from error
        with self._lock:
            while len(self._views) >= max(1, _MAX_OPEN // len(_readers)):
                del self._views[next(iter(self._views))]
            self._views[number] = view
        return view

    def _open_raw(self, shard: Shard) -> BinaryIO:
        """Opens the uncompressed file; unpacked once, beside the compressed one or in the cache."""
        raw, packed, method = shard.raw, shard.packed, shard.compression

        def check(data: memoryview, kept: bool) -> None:
            where = self._files.location(raw.name)
            if kept or self._check_hashes:
                check_file_hashes(where, raw, data)
            check_header(where, shard, data)

        if (
            packed is None
            or method is None
            or (self._files.is_local and self._files.exists(raw.name))
        ):
            return self._files.open(raw.name, raw.size, check)

        def unpack() -> memoryview:
            where = self._files.location(packed.name)
            with self._files.open(packed.name, packed.size) as file:
                data = file.read()
            if self._check_hashes:
                check_file_hashes(where, packed, data)
            try:
                return compression.decompress(method, data, raw.size)
            except ValueError as error:
                raise UserError(
                    f"expected {raw.size} bytes compressed in {where}, found damaged data "
                    f"({error}); copy it again"
                ) from error

        return self._files.make(raw.name, raw.size, unpack, check)

    def _forget_file(self, name: str) -> None:
        """Drops the map of a file that the cache removes; its arrays stay valid."""
        self._views.pop(self._number_of.get(name, -1), None)
