"""Writes MDS datasets, byte for byte as mosaicml-streaming does, which reads them too."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microdit_jax.data import mds_encodings
from microdit_jax.data.compression import compress, parse_compression
from microdit_jax.data.mds_format import INDEX, digest
from microdit_jax.errors import UserError
from microdit_jax.files import disk_errors, read_json, write_bytes


class MdsWriter:
    """Writes samples into shards, and index.json at the end; a context manager.

    Leaving the block by an exception writes no index, so the folder never looks finished.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        columns: Mapping[str, str],
        *,
        compression: str | None = None,
        hashes: Sequence[str] = (),
        size_limit: int = 1 << 26,
    ):
        """Makes the folder, which must have no index yet.

        Args:
          columns: name -> encoding (`mds_encodings`); stored in sorted order.
          compression: "zstd", "gz:6", ...; None writes shards as they are.
          hashes: sorted names of algorithms, such as "sha1", "xxh64", kept in the index.
          size_limit: bytes of a shard before compression.
        Raises:
          UserError: the folder has an index, or an option is unknown.
        """
        self.folder = Path(folder)
        if (self.folder / INDEX).exists():
            raise UserError(f"expected no dataset in {folder}, found an index; choose another")
        try:
            self._encodings = {name: mds_encodings.parse(columns[name]) for name in sorted(columns)}
            if compression is not None:
                parse_compression(compression)
            for algorithm in hashes:
                digest(algorithm, b"")
        except ValueError as error:
            raise UserError(f"cannot write {folder}: {error}") from error
        self._config = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": list(hashes),
            "size_limit": size_limit,
            "column_names": list(self._encodings),
            "column_encodings": [columns[name] for name in self._encodings],
            "column_sizes": [encoding.size for encoding in self._encodings.values()],
        }
        self._config_bytes = json.dumps(self._config, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._samples: list[bytes] = []
        self._size = self._empty_size = 4 + 4 + len(self._config_bytes)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "MdsWriter":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.finish()

    def write(self, sample: Mapping[str, Any]) -> None:
        """Adds one sample; bytes are stored as they are, whatever the column's encoding.

        Raises:
          UserError: a column is missing or too much, or its value does not fit.
        """
        if sample.keys() != self._encodings.keys():
            raise UserError(
                f"expected columns {', '.join(self._encodings)}, found {', '.join(sorted(sample))}"
            )
        sizes, parts = [], []
        for name, encoding in self._encodings.items():
            value = sample[name]
            try:
                part = value if isinstance(value, bytes) else encoding.encode(value)
                if encoding.size not in (None, len(part)):
                    raise ValueError(f"{len(part)} bytes, expected {encoding.size}")
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise UserError(f"column {name} cannot hold this value: {error}") from error
            if encoding.size is None:
                sizes.append(len(part))
            parts.append(part)
        encoded = np.array(sizes, "<u4").tobytes() + b"".join(parts)
        if self._samples and self._config["size_limit"] < self._size + len(encoded) + 4:
            self._flush()
        self._samples.append(encoded)
        self._size += len(encoded) + 4

    def finish(self) -> None:
        """Writes the last shard and the index."""
        if self._samples:
            self._flush()
        write_index(self.folder, self._shards)

    def _flush(self) -> None:
        n = len(self._samples)
        offsets = np.cumsum([4 + 4 * (n + 1) + len(self._config_bytes), *map(len, self._samples)])
        if offsets[-1] >= 2**32:
            raise UserError(f"a shard holds less than 4 GiB, found {offsets[-1]} bytes; split it")
        head = np.array([n, *offsets], "<u4").tobytes() + self._config_bytes
        data = head + b"".join(self._samples)
        name, packed = f"shard.{len(self._shards):05}.mds", None
        raw = self._describe(name, data)
        if self._config["compression"] is not None:
            name += "." + parse_compression(self._config["compression"])[0]
            data = compress(self._config["compression"], data)
            packed = self._describe(name, data)
        write_bytes(self.folder / name, data)
        entry = {**self._config, "samples": n, "raw_data": raw, "zip_data": packed}
        self._shards.append(entry)
        self._samples, self._size = [], self._empty_size

    def _describe(self, name: str, data: bytes) -> dict[str, Any]:
        hashes = {algorithm: digest(algorithm, data) for algorithm in self._config["hashes"]}
        return {"basename": name, "bytes": len(data), "hashes": hashes}


def merge_index(folder: str | os.PathLike) -> int:
    """Writes the index over all datasets in direct subfolders, in order of name.

    Returns:
      the number of samples.
    Raises:
      UserError: no subfolder has an index.
    """
    folder = Path(folder)
    indices = sorted(folder.glob(f"*/{INDEX}"))
    if not indices:
        raise UserError(f"expected parts with {INDEX} below {folder}, found none")
    shards = []
    for index in indices:
        for shard in read_json(index)["shards"]:
            for key in ("raw_data", "zip_data"):
                if shard[key]:
                    shard[key]["basename"] = f"{index.parent.name}/{shard[key]['basename']}"
            shards.append(shard)
    write_index(folder, shards)
    return sum(shard["samples"] for shard in shards)


def write_index(folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Writes index.json, whole or not at all."""
    text = json.dumps({"version": 2, "shards": list(shards)}, sort_keys=True)
    write_bytes(folder / INDEX, text.encode())
