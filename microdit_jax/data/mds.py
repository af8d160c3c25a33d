"""Reads MosaicML MDS datasets: random access through memory maps, without torch.

Format (version 2 of mosaicml-streaming): index.json lists shards; a shard is
  u32 n | u32 offset[n + 1], byte positions in the file | a JSON copy of the columns | n samples
and a sample is one u32 size for each column of varying size, then the columns' bytes in order.
"""

import bisect
import dataclasses
import hashlib
import itertools
import os
import struct
import threading
import weakref
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import xxhash

from microdit_jax.data import compression, mds_encodings
from microdit_jax.data.mapped import map_file
from microdit_jax.data.shard_files import ShardFiles
from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json

INDEX = "index.json"
SUFFIX = ".mds"  # of shards, as all writers name them
_MAX_BYTES = 2**32 - 1  # of a shard, whose offsets are u32
# Shards kept mapped by all readers together; the kernel allows 65,530 maps a process.
_MAX_OPEN = 32_768
_readers: "weakref.WeakSet[MdsReader]" = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a shard by the index: its name, its size in bytes, its hashes by algorithm."""

    name: str
    size: int
    hashes: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of the index.

    Attributes:
      packed, compression: its compressed file and the method; both None where there is none.
    """

    samples: int
    columns: dict[str, str]
    raw: File
    packed: File | None
    compression: str | None


class MdsReader:
    """Random access to the samples of one MDS dataset; safe in threads.

    Attributes:
      columns: name -> encoding, the same for all shards, in stored (sorted) order.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        cache: str | os.PathLike | None = None,
        cache_bytes: int = 100 * 10**9,
        check_hashes: bool = False,
    ):
        """Reads the index only; shards are opened when first used.

        Args:
          root: the folder or fsspec URL with index.json.
          cache, cache_bytes: see `ShardFiles`.
          check_hashes: compare each file with the index's hashes when it is first opened.
        Raises:
          UserError: the index is missing, damaged, or of a format this cannot read.
        """
        self._files = ShardFiles(
            root, cache=cache, cache_bytes=cache_bytes, on_evict=self._forget_file
        )
        self.shards = _read_index(self._files)
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
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        view = self._views.get(number)
        if view is None:
            view = self._open(number)
        self._files.check_uncut(self.shards[number].raw.name, len(view))
        begin, end = struct.unpack_from("<2I", view, 4 + 4 * (index - self._starts[number]))
        columns, at = {}, begin + self._sizes.size
        if at <= end:
            varying = iter(self._sizes.unpack_from(view, begin))
            for name, encoding in self._encodings.items():
                size = next(varying) if encoding.size is None else encoding.size
                columns[name] = view[at : at + size]
                at += size
        if at != end:
            raise UserError(
                f"expected {end - begin} bytes in {self.where(index)}, found columns of "
                f"{at - begin} bytes; the shard is damaged: copy it again"
            )
        return columns

    def where(self, index: int) -> str:
        """ "sample 7 of FILE", for messages."""
        number = bisect.bisect_right(self._starts, index) - 1
        file = self._files.location(self.shards[number].raw.name)
        return f"sample {index - self._starts[number]} of {file}"

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
                _check_file_hashes(where, raw, data)
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
                _check_file_hashes(where, packed, data)
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


def _read_index(files: ShardFiles) -> list[Shard]:
    where = files.location(INDEX)
    if not files.exists(INDEX):
        raise UserError(
            f"expected an MDS dataset with {where}, found no such file; name the folder that "
            "holds it, or make a lost one of a local folder's shards "
            f"(python -m microdit_jax.prepare.mds_index --input={visible(files.root, 500)})"
        )
    try:
        index = parse_json(files.read(INDEX))
        if index["version"] != 2:
            raise ValueError(f"version {visible(index['version'], 60)}, expected 2")
        shards = [parse_shard(entry) for entry in index["shards"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = visible(f"no {error}" if isinstance(error, KeyError) else error)
        raise UserError(
            f"expected an index of MDS shards in {where}, could not use it ({what}); write or copy "
            "it again"
        ) from error
    seen: set[str] = set()
    for number, shard in enumerate(shards):
        if shard.raw.name in seen:
            raise UserError(
                f"expected each shard once in {where}, found {visible(shard.raw.name)} twice, so "
                "that its samples would be read twice; write or copy the index again"
            )
        seen.add(shard.raw.name)
        if shard.columns != shards[0].columns:
            raise UserError(
                f"expected the same columns in all shards of {where}, found "
                f"{visible(shard.columns)} in shard {number} and {visible(shards[0].columns)} in "
                "the first; keep such datasets apart"
            )
    return shards


def parse_shard(entry: dict[str, Any]) -> Shard:
    """Returns a shard of its entry in the index; raises ValueError or KeyError if that is bad."""
    if entry["version"] != 2 or entry["format"] != "mds":
        raise ValueError(
            f"a shard of format {entry['format']!r} version {entry['version']!r}, expected mds 2"
        )
    names, encodings = entry["column_names"], entry["column_encodings"]
    if len(set(names)) != len(names) or list(names) != sorted(names):
        raise ValueError(f"columns {visible(names)} are not sorted, or not different")
    if not all(isinstance(text, str) for text in (*names, *encodings)):
        raise ValueError(f"columns {visible(names)} that are no texts")
    if [mds_encodings.parse(e).size for e in encodings] != entry["column_sizes"]:
        raise ValueError(f"sizes {entry['column_sizes']} do not fit the encodings {encodings}")
    packed, method = entry["zip_data"], entry["compression"]
    if (packed is None) != (method is None):
        raise ValueError("compression and zip_data do not fit each other")
    if method is not None:
        compression.parse_compression(method)
    samples = entry["samples"]
    if type(samples) is not int or samples < 0:
        raise ValueError(f"a shard of {visible(samples, 60)} samples")
    columns = dict(zip(names, encodings, strict=True))
    raw = _parse_file(entry["raw_data"])
    if raw.size > _MAX_BYTES or 4 * (samples + 2) > raw.size:
        raise ValueError(f"{samples} samples in {raw.size} bytes, of at most {_MAX_BYTES}")
    if packed is not None and not raw.name.endswith(SUFFIX):
        raise ValueError(f"a shard to be unpacked into {visible(raw.name)}, expected {SUFFIX}")
    return Shard(samples, columns, raw, None if packed is None else _parse_file(packed), method)


def _parse_file(entry: dict[str, Any]) -> File:
    name, size = PurePosixPath(entry["basename"]), entry["bytes"]
    if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in str(name):
        raise ValueError(f"a file outside of the dataset, {visible(entry['basename'])}")
    if type(size) is not int or size < 0:
        raise ValueError(f"a file of {visible(size, 60)} bytes")
    hashes = dict(entry["hashes"])
    if not all(isinstance(text, str) for pair in hashes.items() for text in pair):
        raise ValueError(f"hashes {visible(hashes)} that are no texts")
    return File(str(name), size, hashes)


def check_header(where: str, shard: Shard, view: memoryview) -> None:
    """Checks all that reading relies on: the number of samples, and offsets inside the file."""
    n = int.from_bytes(view[:4], "little")
    header = 4 + 4 * (n + 1)
    if n != shard.samples or header > len(view):
        raise UserError(
            f"expected {shard.samples} samples in {where}, found {n} in its header; it is damaged "
            "or belongs to another index: copy both again"
        )
    offsets = np.frombuffer(view[4:header], "<u4")
    if offsets[0] < header or offsets[-1] != len(view) or np.any(offsets[1:] < offsets[:-1]):
        raise UserError(
            f"expected rising offsets up to {len(view)} bytes in {where}, found others; it is "
            "damaged: copy it again"
        )
    try:  # the shard's own copy of the columns; other writers may leave it out
        columns = parse_json(bytes(view[header : offsets[0]]))
        found = dict(zip(columns["column_names"], columns["column_encodings"], strict=True))
    except (ValueError, KeyError, TypeError):
        return
    if found != shard.columns:
        raise UserError(
            f"expected columns {visible(shard.columns)} in {where}, found {visible(found)}; it "
            "belongs to another index, or one of them is damaged: copy both again"
        )


def digest(algorithm: str, data: bytes | memoryview) -> str:
    """Returns the hexadecimal hash by the index's name for it, such as "sha1" or "xxh64".

    Raises:
      ValueError: an unknown name.
    """
    if algorithm in xxhash.algorithms_available:
        return getattr(xxhash, algorithm)(data).hexdigest()
    if algorithm not in hashlib.algorithms_available or algorithm.startswith("shake"):
        raise ValueError(f"unknown hash {visible(algorithm, 60)}")
    return hashlib.new(algorithm, data).hexdigest()


def _check_file_hashes(where: str, file: File, data: bytes | memoryview) -> None:
    for algorithm, expected in file.hashes.items():
        try:
            found = digest(algorithm, data)
        except ValueError as error:
            raise UserError(f"cannot check {where}: {error}; read without checking") from error
        if found != expected:
            raise UserError(
                f"expected {visible(algorithm)} {visible(expected, 200)} of {where}, found "
                f"{found}; the file is damaged: copy it again"
            )
