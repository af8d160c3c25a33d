"""Archives and tables of captions."""

import bz2
import io
import json
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Mapping

Corpus = Mapping[str, bytes]


def _tar() -> Corpus:
    def file(**members: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return out.getvalue()[: 512 * 8]  # without the zeros after the end

    def special(kind: bytes, name: str, link: str = "") -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        return info.tobuf() + bytes(1024)

    whole = file(**{"a.jpg": b"\xff\xd8", "a.txt": b"a caption", "b.json": b'{"caption": "b"}'})
    pax = tarfile.TarInfo("é" * 120 + ".jpg")
    huge = tarfile.TarInfo("x" * 20)
    huge.type, huge.size = tarfile.XHDTYPE, 6 * 10**9
    sparse = b"22 GNU.sparse.major=1\n" + b"22 GNU.sparse.minor=0\n" + b"26 GNU.sparse.realsize=9\n"
    sparse_info = tarfile.TarInfo("p")
    sparse_info.type, sparse_info.size = tarfile.XHDTYPE, len(sparse)
    plain = tarfile.TarInfo("sparse")
    plain.size = 4
    return {
        "whole": whole,
        "cut": whole[:700],
        "pax": pax.tobuf(tarfile.PAX_FORMAT) + bytes(1024),
        "pax_huge": huge.tobuf() + bytes(512),
        "gnu_long": tarfile.TarInfo("y" * 200).tobuf(tarfile.GNU_FORMAT) + bytes(1024),
        "link": special(tarfile.SYMTYPE, "a.jpg", "/etc/passwd"),
        "hard_link": special(tarfile.LNKTYPE, "a.jpg", "a.jpg"),
        "device": special(tarfile.CHRTYPE, "a.jpg"),
        "sparse": special(tarfile.GNUTYPE_SPARSE, "a.jpg"),
        "pax_sparse": sparse_info.tobuf() + sparse.ljust(512, b"\0") + plain.tobuf() + bytes(1024),
        "outside": special(tarfile.REGTYPE, "../../x.jpg"),
        "escape": special(tarfile.REGTYPE, "\x1b[2J\n.jpg"),
        "bz2": bz2.compress(file(a=b"a" * 100)),
        "xz": lzma.compress(file(a=b"a" * 100)),
    }


def _zip() -> Corpus:
    def file(method: int, **members: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, data in members.items():
                archive.writestr(zipfile.ZipInfo(name), data, method)
        return out.getvalue()

    members = {"a.webp": b"RIFF" + bytes(20), "p.json": b'{"a.webp": {"p": "a prompt"}}'}
    found = {
        "stored": file(zipfile.ZIP_STORED, **members),
        "deflated": file(zipfile.ZIP_DEFLATED, **members),
        "bz2": file(zipfile.ZIP_BZIP2, **members),
        "lzma": file(zipfile.ZIP_LZMA, **members),
        "escape": file(zipfile.ZIP_STORED, **{"\x1b[2J\n.webp": b"x"}),
        "outside": file(zipfile.ZIP_STORED, **{"../x.webp": b"x"}),
    }
    stored = found["stored"]
    lies = bytearray(found["deflated"])
    for place, field in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = lies.index(place) + field
        lies[at : at + 4] = struct.pack("<I", 0xFFFFFFF0)
    return found | {
        "cut": stored[:-10],
        "encrypted": stored.replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0"),
        "method": stored.replace(
            b"PK\1\2\x14\x03\x14\0\0\0\0\0", b"PK\1\2\x14\x03\x14\0\0\0\x63\0"
        ),
        "size_lies": bytes(lies),
        "bomb": file(zipfile.ZIP_DEFLATED, **{"b.webp": bytes(10**6)}),
    }


def _table() -> Corpus:
    rows = [{"image": "a.jpg", "caption": "an a"}, {"image": "b.jpg", "caption": "a b"}]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return {
        "csv": b'\0image,caption\na.jpg,an a\nb.jpg,"a\nb"\n',
        "tsv": b'\1image\tcaption\na.jpg\tan "a\n',
        "jsonl": b"\2" + lines,
        "json": b"\3" + json.dumps(rows).encode(),
        "csv_ragged": b"\0a,b\n1,2,3\n",
        "csv_null": b"\0a,b\n\0,2\n",
        "jsonl_deep": b"\2" + b"[" * 4000,
        "json_deep": b"\3" + b"[" * 4000,
        "json_number": b"\3" + b"[" + b"9" * 4300 + b"]",
        "json_surrogate": b'\3[{"caption": "\\ud800"}]',
        "json_object": b'\3{"a": 1}',
        "json_number_alone": b"\0037",
        "latin1": b"\2\xff\xfe\n",
        "empty": b"",
    }


MAKERS = {"tar": _tar, "zip": _zip, "table": _table}
