"""Indices and shards of MDS datasets."""

import json
import struct
from collections.abc import Mapping

from fuzz.targets.datasets import COLUMNS, SHARD, index_of
from microdit_jax.data.mds_encodings import parse

Corpus = Mapping[str, bytes]


def _mds_index() -> Corpus:
    whole, raw = index_of(13, column_names=[], column_encodings=[], column_sizes=[]), "raw_data"
    strings = {"column_names": ["a"], "column_encodings": ["str"], "column_sizes": [None]}

    one = {"basename": SHARD, "bytes": 13, "hashes": {}}

    def file(**changes: object) -> dict[str, object]:
        return {raw: one | changes}

    long = "ndarray:float16:" + ",".join(["65536"] * 9)
    return {
        "whole": whole,
        "one_column": index_of(13, samples=1, **strings),
        "all": index_of(13),
        "outside": index_of(13, **file(basename="../x")),
        "absolute": index_of(13, **file(basename="/etc/passwd")),
        "huge": index_of(13, **file(bytes=1 << 62)),
        "zipped": index_of(13, compression="zstd", zip_data=one),
        "bomb": index_of(3 * 10**9, compression="gz:6", zip_data=one),
        "many": index_of(13, samples=1 << 60, **strings),
        "dims": index_of(13, column_names=["a"], column_encodings=[long], column_sizes=[0]),
        "names": index_of(
            13, column_names="ab", column_encodings=["str", "str"], column_sizes=[None, None]
        ),
        "escape": index_of(13, **file(basename="\x1b[2J\nerror: forged")),
        "surrogate": index_of(13, **file(basename="\ud800")),
        "null": index_of(13, **file(basename="a\0b")),
        "deep": b"[" * 4000,
        "no_object": b"[]",
    }  # fmt: skip


def _shard(*values: Mapping[str, bytes]) -> bytes:
    sizes = {name: parse(encoding).size for name, encoding in COLUMNS.items()}
    samples = [
        b"".join(struct.pack("<I", len(v[n])) for n, size in sizes.items() if size is None)
        + b"".join(v[n] for n in COLUMNS)
        for v in values
    ]
    about = json.dumps({"column_names": list(COLUMNS), "column_encodings": list(COLUMNS.values())})
    position = 4 + 4 * (len(samples) + 1) + len(about)
    offsets = [position]
    for sample in samples:
        offsets.append(offsets[-1] + len(sample))
    head = struct.pack(f"<{len(offsets) + 1}I", len(samples), *offsets)
    return head + about.encode() + b"".join(samples)


def _mds_shard() -> Corpus:
    good = {
        "a": struct.pack("<q", -5),
        "b": "café".encode(),
        "c": b'{"x": [1, null]}',
        "d": bytes([9, 2 << 2, 2, 2]) + bytes(range(16)),
        "e": struct.pack("<3I", 1, 2, 3) + b"RGB" + bytes(6),
        "f": bytes(4) + struct.pack("<3I", 2, 1, 2) + b"abc",
        "g": b"\7",
        "h": bytes(8),
        "i": b"1.50",
        "j": struct.pack("<2I", 1, 3) + b"abc",
    }
    whole = _shard(good, good)
    bad = {
        "pil_of_no_size": {"e": struct.pack("<3I", 0, 0, 3) + b"RGB"},
        "pil_huge": {"e": struct.pack("<3I", 1 << 31, 1 << 31, 1) + b"L"},
        "json_deep": {"c": b"[" * 2500},
        "json_surrogate": {"c": b'"\\ud800"'},
        "json_number": {"c": b"9" * 4500},
        "list_huge": {"f": bytes(4) + struct.pack("<I", (1 << 32) - 1)},
        "decimal": {"i": b"1e999999999"},
        "decimal_nan": {"i": b"sNaN"},
        "array_dims": {"d": bytes([9, 15 << 2 | 3]) + b"\xff" * 120},
        "text": {"b": b"\xff\xfe"},
        "text_escape": {"b": b"\x1b[2J\r\nerror: forged"},
    }
    return {
        "whole": whole,
        "cut": whole[:-4],
        "no_samples": struct.pack("<I", 0),
        "offsets": struct.pack("<4I", 2, 16, 8, 16),
        **{name: _shard(good, good | change) for name, change in bad.items()},
    }


MAKERS = {"mds_index": _mds_index, "mds_shard": _mds_shard}
