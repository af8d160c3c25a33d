"""Readers of MDS datasets: the index, and a shard with values of every encoding."""

import itertools
import json

from fuzz.grammar import json_document
from fuzz.scratch import Scratch
from fuzz.targets import Read, Target
from microdit_jax.data.mds import MdsReader
from microdit_jax.data.mds_encodings import parse
from microdit_jax.errors import UserError

SHARD = "shard.00000.mds"
COLUMNS = {
    "a": "int",
    "b": "str",
    "c": "json",
    "d": "ndarray",
    "e": "pil",
    "f": "list[png]",
    "g": "uint8",
    "h": "ndarray:float16:2,2",
    "i": "str_decimal",
    "j": "jpeg_array",
}
SAMPLES = 2


def index_of(num_bytes: int, **changes: object) -> bytes:
    """Returns the index.json of a dataset of one shard of that size."""
    shard = {
        "version": 2,
        "format": "mds",
        "samples": SAMPLES,
        "size_limit": None,
        "hashes": [],
        "column_names": list(COLUMNS),
        "column_encodings": list(COLUMNS.values()),
        "column_sizes": [parse(encoding).size for encoding in COLUMNS.values()],
        "raw_data": {"basename": SHARD, "bytes": num_bytes, "hashes": {}},
        "zip_data": None,
        "compression": None,
    }
    return json.dumps({"version": 2, "shards": [shard | changes]}).encode()


def _read(scratch: Scratch) -> None:
    reader = MdsReader(scratch.folder / "mds")
    for index in itertools.islice(range(len(reader)), 8):
        try:
            reader[index]
        except UserError:  # one damaged sample; the others are tried too
            continue


def _open_index(scratch: Scratch) -> Read:
    scratch.file(f"mds/{SHARD}", b"\1\0\0\0\x0c\0\0\0\x0d\0\0\0A")

    def read(data: bytes) -> None:
        scratch.file("mds/index.json", data)
        _read(scratch)

    return read


def _open_shard(scratch: Scratch) -> Read:
    def read(data: bytes) -> None:
        scratch.file("mds/index.json", index_of(len(data)))
        scratch.file(f"mds/{SHARD}", data)
        _read(scratch)

    return read


KEYS = tuple(
    f'"{key}":'.encode()
    for key in ("version", "shards", "format", "samples", "column_names", "column_encodings",
                "column_sizes", "raw_data", "basename", "bytes", "hashes", "zip_data",
                "compression")
)  # fmt: skip
VALUES = (
    b'"zstd"',
    b'"snappy"',
    b'"mds"',
    b'"pkl"',
    b'"../x"',
    b"1e99",
    b"null",
    b"[[[[",
    b"\\ud800",
)
TARGETS = {
    "mds_index": Target(_open_index, (UserError,), KEYS + VALUES, json_document),
    "mds_shard": Target(_open_shard, (UserError,), (b"\xff\xff\xff\xff", b"NaN", b"RGB", b"{}")),
}
