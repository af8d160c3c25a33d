"""Checkpoints: pickles as torch.save writes them, and those made against readers."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

from fuzz.zips import stored_zip

DISTRIBUTED = Path(__file__).parents[2] / "tests" / "golden" / "torch_files" / "distcp"

Corpus = Mapping[str, bytes]


def _storage(key: bytes, kind: bytes = b"Float", count: bytes = b"K\x08") -> bytes:
    size = struct.pack("<I", len(key))
    return (
        b"(X\7\0\0\0storagectorch\n" + kind + b"Storage\nX" + size + key + b"X\3\0\0\0cpu" + count
        + b"tQ"
    )  # fmt: skip


def _tensor(storage: bytes, shape: bytes = b"K\2K\4\x86", strides: bytes = b"K\4K\1\x86") -> bytes:
    rest = b"K\0" + shape + strides + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def _dict(**values: bytes) -> bytes:
    items = [b"X" + struct.pack("<I", len(k)) + k.encode() + v for k, v in values.items()]
    return b"\x80\2ccollections\nOrderedDict\n)R(" + b"".join(items) + b"u."


def pickles() -> Corpus:
    """Returns pickles of .pt files: what torch.save writes, and what was made against readers."""
    kinds = (b"Float", b"Half", b"BFloat16", b"Long", b"Byte", b"Bool", b"Double", b"Int")
    found = {
        k.decode().lower(): _dict(w=_tensor(_storage(b"0", k), b"K\4\x85", b"K\1\x85"))
        for k in kinds
    }
    one = _tensor(_storage(b"0"))
    parameter = (
        b"ctorch._utils\n_rebuild_parameter\n(" + one + b"\x88ccollections\nOrderedDict\n)RtR"
    )
    nested = b"}(X\5\0\0\0state}(X\1\0\0\0w" + one + b"uX\4\0\0\0stepM\xe8\3u"
    found |= {
        "parameter": _dict(w=parameter),
        "nested": b"\x80\2" + nested + b".",
        "shared": _dict(
            a=_tensor(_storage(b"0")), b=_tensor(_storage(b"0"), b"K\4\x85", b"K\2\x85")
        ),
        "plain": pickle.dumps({"a": [1, 2.5, None, True, "x", b"y", (1, 2)], "b": -3 << 70}, 2),
        "protocol4": pickle.dumps({"a": [1, {"b": (1, 2, 3, 4)}], "c": {1, 2}}, 4),
        "dtype": b"\x80\2}X\1\0\0\0tctorch\nbfloat16\ns.",
    }
    # Faults of earlier readers (SECURITY.md): each was a crash, a hang or a change of the process.
    dtype = b"ctorch\nbfloat16\n(K\3X\1\0\0\0<NNNK%cK\1K%ctb"
    inner = _tensor(_storage(b"s", b"Char", b"K\1"), b"(K\1t", b"(K\1t")
    hostile = {
        "build_dtype": b"}X\1\0\0\0x" + dtype % (64, 64) + b"s",
        "build_array": b"}X\1\0\0\0x"
        + dtype % (2, 66)
        + b"sX\1\0\0\0w"
        + one
        + b"(K\1(J\xa0\x86\1\0tctorch\nbfloat16\n\x89]K\1atbs",
        "tensor_for_a_size": b"}X\1\0\0\0w" + _tensor(_storage(b"0", b"Char"), inner, inner) + b"s",
        "hash": b"}K\1\x85" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(50)) + b"Ns",
        "deep": b"})" + b"\x85" * 3000 + b"Ns",
        "memo": b"}r\0\0\0\4",
        "memo_large": b"}r\0\0\0\x40",
        "global": b"cos\nsystem\n(X\4\0\0\0truetR",
        "ordered_dict_state": b"ccollections\nOrderedDict\n)R}X\1\0\0\0aK\1sb",
        "long": b"\x8b\xff\xff\xff\x7f",
        "negative": _dict(w=_tensor(_storage(b"0"), b"J\xff\xff\xff\xff\x85", b"K\1\x85"))[2:-1],
        "strides": _dict(w=_tensor(_storage(b"0"), b"K\4\x85", b"J\0\0\0\x40\x85"))[2:-1],
        "cycle": b"]q\0h\0a",
        "escapes": _dict(w=b"c\x1b[2Jos\nsys\x1btem\n")[2:-1],
    }
    return found | {f"hostile_{k}": b"\x80\2" + v + b"." for k, v in hostile.items()}


def _pt() -> Corpus:
    members = {"a/data.pkl": pickles()["shared"], "a/data/0": bytes(32), "a/version": b"3\n"}
    whole = stored_zip(members | {"a/byteorder": b"little"})
    big = stored_zip({"a/byteorder": b"big", **members})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return dict(pickles()) | {
        "whole": whole,
        "big_endian": big,
        "cut": whole[:-30],
        "compressed": file.getvalue(),
    }


def _legacy_pt() -> Corpus:
    magic = b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    about = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    big = pickle.dumps({"little_endian": False}, 2)
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x08NtQ"
    contents = _dict(w=_tensor(storage))
    keys, version = pickle.dumps(["0"], 2), pickle.dumps(1001, 2)
    data = struct.pack("<q", 8) + bytes(32)
    hostile = {name: magic + version + about + value for name, value in pickles().items()}
    return {
        "whole": magic + version + about + contents + keys + data,
        "big_endian": magic + version + big + contents + keys + struct.pack(">q", 8) + bytes(32),
        "cut": magic + version + about + contents + keys + data[:20],
        "no_keys": magic + version + about + contents,
        "version": magic + pickle.dumps(7, 2) + about + contents,
        "machine_is_a_list": magic + version + pickle.dumps([1], 2) + contents,
        "negative": magic
        + version
        + about
        + contents.replace(b"K\x08Nt", b"J\xf8\xff\xff\xffNt")
        + keys
        + data,
        "keys_are_texts": magic + version + about + contents + pickle.dumps("000", 2) + data,
        **{name: value for name, value in hostile.items() if "hostile" in name},
    }


def _safetensors() -> Corpus:
    def file(body: bytes = bytes(16), **header: object) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    once = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    repeated = b"{" + once + b"," + once + b"}"
    return {
        "whole": file(
            a=entry(0, 8, [2]), b=entry(8, 16, [2, 2], "BF16"), __metadata__={"format": "pt"}
        ),
        "types": file(
            a=entry(0, 4, [4], "F8_E4M3"), b=entry(4, 8, [4], "BOOL"), c=entry(8, 16, [1], "I64")
        ),
        "scalar": file(bytes(4), a=entry(0, 4, [])),
        "empty": file(b"", a=entry(0, 0, [0, 3])),
        "none": file(b""),
        "overlap": file(a=entry(0, 16, [4]), b=entry(8, 16, [2])),
        "negative": file(a=entry(0, 16, [-2, -2])),
        "negative_offset": file(a=entry(-16, 0, [4])),
        "huge": file(a=entry(0, 1 << 70, [1 << 68])),
        "gap": file(a=entry(0, 4, [1]), b=entry(8, 16, [2])),
        "bool_size": file(bytes(4), a={"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}),
        "metadata": file(b"", __metadata__={"a": 1}),
        "list": struct.pack("<Q", 2) + b"[]",
        "repeated": struct.pack("<Q", len(repeated)) + repeated + b"\0",
        "deep": struct.pack("<Q", 4000) + b"[" * 4000,
        "length": struct.pack("<Q", 1 << 62) + b"{}",
        "surrogate": file(bytes(4), **{"\ud800": entry(0, 4, [1])}),
        "cut": file(a=entry(0, 8, [2]), b=entry(8, 16, [2]))[:-3],
    }


def _distributed() -> Corpus:
    """Returns metadata that torch wrote, and changes of it that a reader must notice."""
    whole = (DISTRIBUTED / ".metadata").read_bytes()
    return {
        "whole": whole,
        "cut": whole[:-40],
        "outside": whole.replace(b"__0_0.distcp", b"../../passwd"),
        "another_file": whole.replace(b"__0_0.distcp", b"__1_0.distcp"),
        "another_class": whole.replace(b"MetadataIndex", b"_StorageInfo_"),
        "no_offset": whole.replace(b"\x06offset", b"\x06offxet"),
        "not_metadata": pickle.dumps({"a": (1, 2)}, 4),
        "hostile": pickle.dumps({"a": 1}, 4)[:-1] + b"cos\nsystem\n(X\4\0\0\0truetR.",
    }


MAKERS = {
    "pt": _pt,
    "legacy_pt": _legacy_pt,
    "safetensors": _safetensors,
    "distributed": _distributed,
}
