import errno
import io
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from microdit_jax.convert.formats import torch_file
from microdit_jax.convert.formats.safetensors_file import read_safetensors, write_safetensors
from microdit_jax.convert.formats.torch_file import read_torch, write_torch
from microdit_jax.errors import UserError

FILES = pathlib.Path(__file__).parent / "golden" / "torch_files"
A = np.arange(12, dtype=np.float32).reshape(3, 4)

# Of what torch.load(weights_only=True) accepts (torch/_weights_only_unpickler.py), what we use.
SAFE_OPCODES = {
    "PROTO", "GLOBAL", "EMPTY_TUPLE", "REDUCE", "MARK", "BINUNICODE", "BININT", "LONG1", "TUPLE",
    "BINPERSID", "NEWFALSE", "SETITEMS", "STOP",
}  # fmt: skip


class Spy(pickle.Unpickler):
    """Unpickles calls as plain tuples (name, arguments), to compare what two files ask for."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        return lambda *args: (f"{module}.{name}", args)

    def persistent_load(self, pid):
        kind, storage, key, location, count = pid
        return kind, storage(), key, location, count


def member(path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        (found,) = (n for n in archive.namelist() if n.split("/", 1)[1] == name)
        return archive.read(found)


def test_reads_what_torch_saved():
    found = read_torch(FILES / "raw.pt")
    np.testing.assert_array_equal(found["weight"], A / 8)
    np.testing.assert_array_equal(found["bias"], A[0, :3] / 4)
    assert found["weight"].dtype == np.float32


def test_views_strides_types_and_shared_storages():
    found = read_torch(FILES / "views.pt")
    expected = {
        "whole": A,
        "turned": A.T,
        "row": A[1],
        "column": A[:, 2],
        "parameter": A[:2],
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False]),
        "wide": A[0].astype(np.float64),
        "bytes": np.arange(4, dtype=np.uint8),
        "unsigned": np.arange(4, dtype=np.uint16),  # torch saves it as an untyped storage
    }
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array)
    assert np.shares_memory(found["whole"], found["column"])
    assert found["turned"].strides == A.T.strides


@pytest.mark.parametrize(("name", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_half_precision(name, dtype):
    weight = read_torch(FILES / f"{name}.pt")["weight"]
    assert weight.dtype == dtype
    np.testing.assert_array_equal(weight.astype(np.float32), A / 8)


def test_tensors_are_mapped_not_copied():
    weight = read_torch(FILES / "raw.pt")["weight"]
    base = weight
    while hasattr(base, "base"):
        base = base.base
    assert isinstance(base, memoryview) and type(base.obj).__name__ == "mmap"
    with pytest.raises(ValueError, match="read-only"):
        weight[0, 0] = 1


def test_big_endian_storages(tmp_path):
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        archive.writestr("big/data.pkl", member(FILES / "raw.pt", "data.pkl"))
        archive.writestr("big/byteorder", "big")
        for key in ("0", "1"):
            data = np.frombuffer(member(FILES / "raw.pt", f"data/{key}"), "<f4")
            archive.writestr(f"big/data/{key}", data.astype(">f4").tobytes())
    np.testing.assert_array_equal(read_torch(tmp_path / "big.pt")["weight"], A / 8)


def test_a_file_that_wants_to_run_code_is_refused(capfd):
    with pytest.raises(UserError, match=r"refused.*run code, posix\.system"):
        read_torch(FILES / "malicious.pt")
    assert "harm" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"cbuiltins\ngetattr\n)R.",
        b"cnumpy\nload\n)R.",
        b"ctorch.storage\n_load_from_bytes\n)R.",
    ],
)
def test_only_tensor_names_are_known(tmp_path, program):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", program)
    with pytest.raises(UserError, match="refused"):
        read_torch(tmp_path / "x.pt")


def test_a_pickle_cannot_change_what_it_calls(tmp_path):
    state = b"(dX\x05\x00\x00\x00_callcdatetime\ndatetime\ns\x86b."  # setattr by a slot state
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"ctorch._utils\n_rebuild_tensor_v2\nN" + state)
    with pytest.raises(UserError, match="damaged"):
        read_torch(tmp_path / "x.pt")


def test_a_tensor_may_not_reach_beyond_its_storage(tmp_path):
    write_torch(tmp_path / "a.pt", {"weight": A})
    program = member(tmp_path / "a.pt", "data.pkl")
    wider = program.replace(
        b"J\x03\x00\x00\x00J\x04\x00\x00\x00", b"J\x03\x00\x00\x00J\x05\x00\x00\x00"
    )
    assert wider != program
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("b/data.pkl", wider)
        archive.writestr("b/data/0", A.tobytes())
    with pytest.raises(UserError, match="reaches beyond its storage"):
        read_torch(tmp_path / "b.pt")


@pytest.mark.parametrize(("offset", "stride"), [(4, -1), (0, -1), (-1, 1)])
def test_offsets_and_strides_may_not_be_negative(tmp_path, offset, stride):
    """They would read a tensor backwards, or bytes that lie before its storage."""
    write_torch(tmp_path / "a.pt", {"weight": np.arange(5, dtype=np.float32)})
    program = member(tmp_path / "a.pt", "data.pkl")
    size = b"(J\x05\x00\x00\x00t"
    changed = program.replace(
        torch_file._int(0) + size + b"(" + torch_file._int(1) + b"t",
        b"J" + struct.pack("<i", offset) + size + b"(J" + struct.pack("<i", stride) + b"t",
    )
    assert changed != program
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("b/data.pkl", changed)
        archive.writestr("b/data/0", np.arange(5, dtype=np.float32).tobytes())
    with pytest.raises(UserError, match="reaches beyond its storage"):
        read_torch(tmp_path / "b.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_tensors_of_many_chunks_come_back(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("microdit_jax.convert.formats.file_bytes.CHUNK", 64)
    rows = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
    tensors = {"whole": rows, "turned": rows.T, "backwards": rows[::-1], "cut": rows[3:, ::2]}
    path = tmp_path / f"a.{suffix}"
    if suffix == "pt":
        write_torch(path, tensors)
        found = read_torch(path)
    else:
        write_safetensors(path, tensors)
        found, _ = read_safetensors(path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)


def test_truncated_anywhere(tmp_path):
    whole = (FILES / "raw.pt").read_bytes()
    for length in (1, 30, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(UserError, match="expected a .pt file|found an empty"):
            read_torch(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x00\x01\x02\x03 noise", "bytes 00 01 02 03"),
    ],
)
def test_what_is_not_a_checkpoint(tmp_path, contents, message):
    (tmp_path / "x.pt").write_bytes(contents)
    with pytest.raises(UserError, match=message):
        read_torch(tmp_path / "x.pt")


def legacy_bytes(obj_pickle: bytes, keys: list[str], storages: list[bytes], version=1001) -> bytes:
    """A file as PyTorch before 1.6 wrote it."""
    parts = [0x1950A86A20F9469CFC6C, version, {"little_endian": True}]
    head = b"".join(pickle.dumps(part, protocol=2) for part in parts)
    return head + obj_pickle + pickle.dumps(keys, protocol=2) + b"".join(storages)


def test_the_format_before_1_6(tmp_path):
    expected = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = read_torch(FILES / "legacy.pt")
    assert list(found) == ["weight"]
    np.testing.assert_array_equal(found["weight"], expected)
    assert not found["weight"].flags.writeable
    whole = (FILES / "legacy.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for cut in (1, 12 * 4 + 3, 12 * 4 + 40, len(whole) - 60):
        path.write_bytes(whole[: len(whole) - cut])
        with pytest.raises(UserError, match="truncated|damaged"):
            read_torch(path)
    path.write_bytes(whole.replace(b"\x0c\0\0\0\0\0\0\0", b"\x0b\0\0\0\0\0\0\0"))
    with pytest.raises(UserError, match="truncated or damaged"):
        read_torch(path)


def test_the_old_format_runs_nothing_either(tmp_path):
    path = tmp_path / "harm.pt"
    path.write_bytes(legacy_bytes(b"cos\nsystem\n(S'echo harm'\ntR.", [], []))
    with pytest.raises(UserError, match="refused: .*os.system"):
        read_torch(path)
    path.write_bytes(legacy_bytes(b"}.", [], [], version=1000))
    with pytest.raises(UserError, match="expected version 1001 .*found 1000; re-save"):
        read_torch(path)
    # A storage said to be larger than the whole file is not allocated.
    huge = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu\x8a\x05\xff\xff\xff\xff\x7fNtQ."
    path.write_bytes(legacy_bytes(huge, ["0"], []))
    with pytest.raises(UserError, match="truncated or damaged"):
        read_torch(path)


def test_missing_file_and_compressed_zip(tmp_path):
    with pytest.raises(UserError, match="found nothing; check the path"):
        read_torch(tmp_path / "none.pt")
    with pytest.raises(UserError, match="found a folder"):
        read_torch(tmp_path)
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("z/data.pkl", b"\x80\x02}." * 50)
    with pytest.raises(UserError, match="uncompressed"):
        read_torch(tmp_path / "z.pt")


def test_written_files_come_back(tmp_path):
    tensors = {
        "a": A,
        "turned": A.T,
        "cut": A[1:, ::2],
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "half": A.astype(np.float16),
        "brain": A.astype(ml_dtypes.bfloat16),
    }
    write_torch(tmp_path / "a.pt", tensors)
    found = read_torch(tmp_path / "a.pt")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].ctypes.data % 64 == 0 or not tensor.size  # aligned as torch aligns


def test_written_pickles_ask_for_what_torchs_own_ask_for(tmp_path):
    tensors = read_torch(FILES / "raw.pt")
    write_torch(tmp_path / "a.pt", tensors)
    ours, theirs = member(tmp_path / "a.pt", "data.pkl"), member(FILES / "raw.pt", "data.pkl")
    # theirs also sets _metadata on its OrderedDict, with a BUILD that a dict has no place for
    theirs = theirs[: theirs.rindex(b"}", 0, theirs.rindex(b"_metadata"))] + b"."
    assert Spy(io.BytesIO(ours)).load() == Spy(io.BytesIO(theirs)).load()
    assert {opcode.name for opcode, _, _ in pickletools.genops(ours)} <= SAFE_OPCODES
    for name in ("version", "byteorder"):
        assert member(tmp_path / "a.pt", name) == member(FILES / "raw.pt", name)
    for key in ("0", "1"):
        assert member(tmp_path / "a.pt", f"data/{key}") == member(FILES / "raw.pt", f"data/{key}")


def test_large_counts_are_pickled_as_long_integers():
    for value in (0, 255, 2**31 - 1, 2**31, 2**40):
        assert pickle.loads(b"\x80\x02" + torch_file._int(value) + b".") == value


def test_dtype_casts_floating_tensors_only(tmp_path):
    write_torch(tmp_path / "a.pt", {"w": A, "n": np.array(3, np.int64)}, dtype="bfloat16")
    found = read_torch(tmp_path / "a.pt")
    assert found["w"].dtype == ml_dtypes.bfloat16 and found["n"].dtype == np.int64


def test_unknown_types_are_refused_before_writing(tmp_path):
    with pytest.raises(UserError, match="complex64 at w"):
        write_torch(tmp_path / "a.pt", {"w": A.astype(np.complex64)})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        write_torch(tmp_path / "a.pt", {"w": A})
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage())
    with pytest.raises(UserError, match="found 0.00 GB free"):
        write_torch(tmp_path / "a.pt", {"w": A})


class _Usage:
    free = 10


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    write_torch(tmp_path / "a.pt", {"w": A})

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_torch(tmp_path / "a.pt", {"w": A + 1}, progress=stop)
    np.testing.assert_array_equal(read_torch(tmp_path / "a.pt")["w"], A)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
