"""The format of MosaicML MDS datasets: their index, and the head of each shard.

Format (version 2 of mosaicml-streaming): index.json lists shards; a shard is
  u32 n | u32 offset[n + 1], byte positions in the file | a JSON copy of the columns | n samples
and a sample is one u32 size for each column of varying size, then the columns' bytes in order.
"""

import dataclasses
import hashlib
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import xxhash

from microdit_jax.data import compression, mds_encodings
from microdit_jax.data.shard_files import ShardFiles
from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json

INDEX = "index.json"
SUFFIX = ".mds"  # of shards, as all writers name them
_MAX_BYTES = 2**32 - 1  # of a shard, whose offsets are u32
_COLUMNS_BYTES = 4096  # for a shard's JSON copy of its columns; those of latents take 300


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


def read_index(files: ShardFiles) -> list[Shard]:
    """Reads the index of a dataset; raises UserError if it is missing, damaged or of no use."""
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


def header_bytes(shard: Shard) -> int:
    """Returns the size in bytes of what stands before the samples, at most: offsets and columns."""
    return min(shard.raw.size, 4 * (shard.samples + 2) + _COLUMNS_BYTES)


def check_header(where: str, shard: Shard, view: memoryview, size: int | None = None) -> None:
    """Checks all that reading relies on: the number of samples, and offsets inside the file.

    Args:
      view: the shard, or its first `header_bytes`.
      size: of the shard in bytes; by default the view's.
    """
    size = len(view) if size is None else size
    n = int.from_bytes(view[:4], "little")
    header = 4 + 4 * (n + 1)
    if n != shard.samples or header > len(view):
        raise UserError(
            f"expected {shard.samples} samples in {where}, found {n} in its header; it is damaged "
            "or belongs to another index: copy both again"
        )
    offsets = np.frombuffer(view[4:header], "<u4")
    if offsets[0] < header or offsets[-1] != size or np.any(offsets[1:] < offsets[:-1]):
        raise UserError(
            f"expected rising offsets up to {size} bytes in {where}, found others; it is "
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


def check_file_hashes(where: str, file: File, data: bytes | memoryview) -> None:
    """Raises UserError unless a file's bytes have all the hashes that the index gives."""
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
