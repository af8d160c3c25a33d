"""Real files with what people have beside their tensors; damage is found wherever it can be."""

import pathlib
import re
import shutil
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from microdit_jax.convert.formats.pickle_machine import OPCODES
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.formats.torch_file import TorchFile, read_torch, write_torch
from microdit_jax.convert.formats.torch_names import check_name
from microdit_jax.convert.formats.torch_values import LeftAside
from microdit_jax.convert.keymap import Rule, build_table, is_finite, to_params
from microdit_jax.convert.state_dict import read_state_dict
from microdit_jax.errors import UserError

FILES = pathlib.Path(__file__).parent / "golden" / "torch_files"
A = np.arange(12, dtype=np.float32).reshape(3, 4)


def outcome(path: pathlib.Path) -> dict | str:
    """The tensors' bytes, or the error."""
    try:
        found = read_torch(path)
    except UserError as error:
        assert str(error).isprintable()
        return str(error)
    return {name: (t.dtype, t.shape, t.tobytes()) for name, t in found.items()}


def test_a_checkpoint_of_composer():
    """Versions, dates, random states, NumPy's numbers and Namespaces stand beside the weights."""
    found = read_state_dict(FILES / "composer.pt", "dit")
    assert list(found.tensors) == ["weight", "bias"]
    np.testing.assert_array_equal(found.tensors["weight"], A / 8)
    notes = " | ".join(found.notes)
    for words in ("the version of PyTorch", "datetime.timedelta", "argparse.Namespace", "NumPy"):
        assert words in notes
    contents = read_torch(FILES / "composer.pt")
    moments = contents["state"]["optimizers"]["AdamW"]["state"][0]
    assert moments["exp_avg"].shape == (3, 4) and moments["step"] == 1
    assert contents["state"]["algorithms"] == [("EMA", {"smoothing": 0.99})]
    assert isinstance(contents["args"], LeftAside) and set(contents["metrics"]) == {"loss"}


def test_kinds_that_are_not_supported_are_named():
    found = read_torch(FILES / "kinds.pt")
    np.testing.assert_array_equal(found["weight"], A)
    with pytest.raises(UserError, match="complex64.*sparse.*meta device.*quantised.*save them den"):
        read_state_dict(FILES / "kinds.pt")


def test_a_tensor_of_another_class_is_not_taken_for_its_bytes(tmp_path):
    """Classes of quantised tensors, pickled as torch pickles subclasses."""
    write_torch(tmp_path / "a.pt", {"w": A})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        program, data = archive.read("archive/data.pkl"), archive.read("archive/data/0")
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    start, end = program.index(name), program.index(b"u.")
    inner = program[start + len(name) : end - 1]
    for kind in (b"ctorch\nTensor\n", b"ctorchao.dtypes\nAffineQuantizedTensor\n"):
        call = b"ctorch._tensor\n_rebuild_from_type_v2\n(" + name + kind + inner + b"NtR"
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
            archive.writestr("archive/data.pkl", program[:start] + call + program[end:])
            archive.writestr("archive/data/0", data)
        if b"torchao" not in kind:
            np.testing.assert_array_equal(read_torch(tmp_path / "b.pt")["w"], A)
            continue
        with pytest.raises(UserError, match="the class torchao.dtypes.AffineQuantizedTensor"):
            read_state_dict(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", True),
        ("omegaconf.dictconfig.DictConfig", True),
        ("composer.core.time.TimeUnit", True),
        ("deepspeed.utils.tensor_fragment.fragment_address", True),
        ("numpy.random._pickle.__randomstate_ctor", True),
        ("transformers.hf_api.run", False),
        ("lightning_evil.Class", False),
        ("builtins.getattr", False),
        ("numpy.load", False),
        ("torch.load", False),
        ("__main__.Config", False),
        ("torch.storage._load_from_bytes", False),
    ],
)
def test_names_that_are_left_aside_and_names_that_are_refused(name, harmless):
    if harmless:
        return check_name(FILES / "a.pt", name)
    with pytest.raises(UserError, match=rf"wants to run code, {re.escape(name)}; save the state"):
        check_name(FILES / "a.pt", name)


@pytest.mark.parametrize("name", ["float8", "float8_legacy"])
def test_float8(name):
    found = read_torch(FILES / f"{name}.pt")
    for key, dtype in (("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)):
        assert found[key].dtype == dtype
        expected = (A / 8).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(found[key].astype(np.float32), expected)


def test_files_without_checksums_are_read_and_this_is_said():
    file = TorchFile(FILES / "without_checksums.pt")
    file.verify_all()
    np.testing.assert_array_equal(file.contents["weight"], A)
    assert any("without checksums" in note for note in file.notes)
    assert not any("without checksums" in note for note in TorchFile(FILES / "raw.pt").notes)


@pytest.mark.parametrize("name", ["raw", "views", "ours"])
def test_a_changed_byte_never_gives_other_values(tmp_path, name):
    """Every few bytes of torch's files and of ours: an error, or the same values."""
    if name == "ours":
        write_torch(tmp_path / "whole.pt", {"a": A, "b": A.T.astype(np.float16)})
    else:
        shutil.copy(FILES / f"{name}.pt", tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    expected = outcome(tmp_path / "whole.pt")
    assert isinstance(expected, dict)
    refused = 0
    for position in range(0, len(whole), 13 if name == "views" else 5):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        (tmp_path / "changed.pt").write_bytes(changed)
        found = outcome(tmp_path / "changed.pt")
        assert isinstance(found, str) or found == expected, position
        refused += isinstance(found, str)
    assert refused > len(whole) / 60


def test_only_the_wanted_tensors_are_verified(tmp_path):
    """An optimiser three times as large as the model is not read for its checksums."""
    write_torch(tmp_path / "a.pt", {"dit.a": A, "other.b": A + 1})
    whole = bytearray((tmp_path / "a.pt").read_bytes())
    whole[whole.index((A + 1).tobytes()) + 5] ^= 1
    (tmp_path / "a.pt").write_bytes(whole)
    assert set(read_state_dict(tmp_path / "a.pt", "dit").tensors) == {"a"}
    with pytest.raises(UserError, match="other bytes in archive/data/1 than its checksum"):
        read_state_dict(tmp_path / "a.pt", "other")


def test_the_header_before_a_member_must_agree(tmp_path):
    write_torch(tmp_path / "a.pt", {"a": A, "b": A + 1})
    whole = (tmp_path / "a.pt").read_bytes()
    first = whole.index(b"archive/data/0")
    for changed in (
        whole[:first] + whole[first:].replace(b"data/0", b"data/9", 1),
        whole[: first - 4] + struct.pack("<H", 15) + whole[first - 2 :],
        whole[: first - 12] + struct.pack("<I", 44) + whole[first - 8 :],
    ):
        assert len(changed) == len(whole)
        (tmp_path / "b.pt").write_bytes(changed)
        with pytest.raises(UserError, match="another header before archive/data/0"):
            read_torch(tmp_path / "b.pt")


def test_a_member_stands_once_in_the_directory(tmp_path):
    """A directory that names the same bytes a million times is not gone through."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(100))
    whole = (tmp_path / "a.pt").read_bytes()
    directory = whole.index(b"PK\x01\x02")
    end = whole.index(b"PK\x05\x06")
    last = whole.rindex(b"PK\x01\x02")
    entries = whole[directory:end] + whole[last:end]
    size = len(entries)
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 3, 3, size, directory, 0)
    (tmp_path / "b.pt").write_bytes(whole[:directory] + entries + tail)
    with pytest.raises(UserError, match="a/data/0 twice"):
        read_torch(tmp_path / "b.pt")


def test_weights_must_be_finite_once_they_are_float32():
    table = build_table([Rule("a", "a")], {"a": np.zeros(3, np.float32)})
    assert not is_finite(np.array([0, 1e300])) and is_finite(np.array([0, 1e38]))
    with pytest.raises(UserError, match="finite as float32, found .* 1 tensors: a"):
        to_params({"a": np.array([0, -1e39, 1])}, table)
    to_params({"a": np.array([0, -1e38, 1])}, table)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_values_stay_finite_in_the_type_that_is_written(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write = write_torch if suffix == "pt" else write_safetensors
    with pytest.raises(UserError, match=r"float16 can hold, found -?1 to 70000 in large; write"):
        write(path, {"a": A, "large": np.array([-1, 70_000], np.float32)}, dtype="float16")
    assert not path.exists()
    write(path, {"a": np.array([-1, 70_000, np.inf], np.float32)}, dtype="bfloat16")
    write(path, {"a": np.array([-1, 65_000, np.nan], np.float32)}, dtype="float16")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_])
def test_integers_are_not_taken_as_weights(dtype):
    table = build_table([Rule("a", "a")], {"a": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=rf"floating type.*a \({np.dtype(dtype)}\)"):
        to_params({"a": np.zeros(3, dtype)}, table)
    for floating in (np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2):
        to_params({"a": np.zeros(3, floating)}, table)


def test_every_opcode_is_what_pickletools_calls_it_and_justified():
    import pickletools

    names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    assert {code: opcode.name for code, opcode in OPCODES.items()} == {
        code: names[code] for code in OPCODES
    }
    assert all(re.search(r"\w{3}", opcode.why) for opcode in OPCODES.values())
    never = {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "DUP", "LONG4", "PUT", "GET"}
    assert not never & {opcode.name for opcode in OPCODES.values()}
