"""Our reader of tars gives what tarfile gives, and for damage an error and nothing else."""

import bz2
import gzip
import io
import random
import tarfile
import tracemalloc

import pytest
from support.hostile_files import header, padded, sparse

from microdit_jax.prepare.sources.archives import DAMAGE, members
from microdit_jax.prepare.sources.tar_stream import tar_members

NAMES = [
    "a.jpg", "b/c.txt", "é漢.png", "d" * 90 + ".jpg", f"{'long/' * 40}name.jpg",
    f"{'e' * 150}.txt", f"{'é' * 80}/x.jpg", "./dot.jpg", "/absolute.jpg",
]  # fmt: skip


def tar(format, pack=lambda data: data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for i, name in enumerate(NAMES):
            info = tarfile.TarInfo(name)
            info.size, info.uname = 300 * i, "é"
            info.pax_headers = {"comment": "x" * 2000} if format == tarfile.PAX_FORMAT else {}
            archive.addfile(info, io.BytesIO(bytes([i]) * info.size))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, f"{'t' * 120}.jpg"
        archive.addfile(link)
    return pack(file.getvalue())


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_equal_to_tarfile(tmp_path, format, pack):
    if format == tarfile.USTAR_FORMAT:
        names = [name for name in NAMES if len(name.encode()) < 90]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "NAMES", names)
            path = tmp_path / "a.tar"
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=format) as archive:
                for name in [*names, f"{'p' * 120}/{'q' * 80}.jpg"]:  # the name in two fields
                    info = tarfile.TarInfo(name)
                    info.size = 5
                    archive.addfile(info, io.BytesIO(b"words"))
            path.write_bytes(pack(file.getvalue()))
    else:
        path = tmp_path / "a.tar"
        path.write_bytes(tar(format, pack))
    found = [(m.name, m.kind, m.file.read(m.size)) for m in tar_members(path)]
    expected = []
    with tarfile.open(path) as archive:
        for info in archive:
            kind = "file" if info.isfile() else "link" if info.issym() else "other"
            data = archive.extractfile(info) if info.isfile() else None
            expected.append((info.name, kind, b"" if data is None else data.read()))
    assert found == expected


def test_large_numbers_are_read(tmp_path):
    """Sizes above 8 GB, in GNU's binary form and in pax records."""
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("large.bin")
        info.size = 9 * 2**30
        path = sparse(tmp_path / "a.tar", 10 * 2**30)
        with path.open("r+b") as file:
            head = info.tobuf(format)
            file.write(head)
            file.seek(len(head) + info.size)
            file.write(header("b.jpg", 5) + padded(b"words"))
        assert [(m.name, m.size) for m in tar_members(path)] == [
            ("large.bin", 9 * 2**30), ("b.jpg", 5),
        ]  # fmt: skip


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damage_is_one_more_member_with_a_reason(tmp_path, format):
    whole, path = tar(format), tmp_path / "a.tar"
    path.write_bytes(whole)
    count = len(list(members(path)))
    rng = random.Random(0)
    tracemalloc.start()
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: rng.randrange(len(data) - 1024)]
        for _ in range(trial % 5):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        found = list(members(path))
        assert len(found) <= count + 1
        if trial % 3 == 0:
            assert found[-1].reason is not None
    assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    tracemalloc.stop()
    for size in ("-1", "0x10", "9" * 11):
        block = bytearray(header("a.jpg", 0))
        block[124:136] = size.encode().rjust(11) + b"\0"
        block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)
        path.write_bytes(block + bytes(1024))
        with pytest.raises(DAMAGE):
            list(tar_members(path))
