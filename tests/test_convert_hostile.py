"""Checkpoints made to run code, crash or exhaust: each is refused, or read for what it holds.

All are read in one process with 4 GB of address space, which reports on each; a crash, a hang or
a changed dtype fails the test. A few go through the real command.
"""

import json
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
from support.hostile import assert_refused, run_hostile

from microdit_jax.convert.formats.torch_file import write_torch

READ_ALL = """
import json, pathlib, sys, time
import ml_dtypes, numpy as np
from microdit_jax.convert.inputs import find_input, read_config
from microdit_jax.convert.kinds import get_kind
from microdit_jax.convert.state_dict import read_state_dict
from microdit_jax.errors import UserError

sys.addaudithook(lambda event, args: event in REFUSED_EVENTS and print("RAN", event, args))
REFUSED_EVENTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "ctypes.dlopen")
modules = set(sys.modules)
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    start = time.monotonic()
    try:
        if path.suffix == ".json":
            result = repr(read_config(path))
        else:
            if path.name.startswith("note"):
                find_input(path, get_kind("vae"))
            tensors = read_state_dict(path).tensors
            result = {name: [list(t.shape), float(np.asarray(t.flat[0], np.float64))]
                      for name, t in tensors.items() if t.size}
    except UserError as error:
        result = "refused: " + str(error)
    print(json.dumps([path.name, result, time.monotonic() - start]), flush=True)
new = set(sys.modules) - modules
sizes = [np.dtype(getattr(ml_dtypes, n)).itemsize for n in ("bfloat16", "float8_e4m3fn")]
import resource
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # MB
print(json.dumps(["end", sorted(name for name in new if "evil" in name), sizes, peak]))
"""


def int_(value: int) -> bytes:
    """An integer of any size as a pickle has it."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def storage(key: str, count: int, kind: str = "Float") -> bytes:
    return (
        b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu")
    ) + (int_(count) + b"tQ")


def tensor(where: bytes, size: bytes, stride: bytes, offset: bytes = b"K\0") -> bytes:
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + where + offset + size + stride + b"\x89}tR"


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(int_(value) for value in values) + b"t"


def save(path: pathlib.Path, program: bytes, members=None, **options) -> None:
    """A .pt file of one pickle and some storages."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + program + b".")
        for name, data in (members or {}).items():
            archive.writestr(f"a/{name}", data)


def one(value: bytes, name: str = "w") -> bytes:
    """A dict of one key."""
    return b"}" + text(name) + value + b"s"


EIGHT = {"data/0": bytes(8)}
ONE = sizes(1)


def dtype(itemsize: int, flags: int) -> bytes:
    """torch.bfloat16 with a state that would change ml_dtypes' own dtype."""
    state = b"(K\x03" + text("<") + b"NNNK" + bytes([itemsize]) + b"K\x01K" + bytes([flags]) + b"tb"
    return b"ctorch\nbfloat16\n" + state


def issue_recipes(folder: pathlib.Path) -> None:
    """The files of issue 19, as they were reproduced."""
    char = tensor(storage("0", 8, "Char"), ONE, ONE)
    save(folder / "A.pt", one(dtype(64, 64), "x"))
    fake = tensor(storage("0", 8, "Char"), ONE, sizes(100_000)) + b"ctorch\nbfloat16\n\x89]K\1atb"
    save(folder / "C.pt", b"}" + text("x") + dtype(2, 66) + b"s" + text("w") + fake + b"s", EIGHT)
    sized = tensor(storage("s", 1, "Char"), ONE, ONE)
    view = tensor(storage("0", 8, "Char"), sized, sized)
    save(folder / "B.pt", one(view), EIGHT | {"data/s": b"\x64"})
    shared = b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(50))
    save(folder / "H.pt", b"}K\x01\x85" + shared + b"Ns")
    save(folder / "D.pt", b"})" + b"\x85" * 300_000 + b"Ns")
    save(folder / "M1.pt", b"}r\0\0\0\x04")
    save(folder / "M2.pt", b"}r\0\0\0\x40")
    # An OrderedDict with a __dict__ of its own in the place of a storage.
    fake = b"ccollections\nOrderedDict\n)R}" + text("data") + char + b"sb"
    save(folder / "O.pt", one(tensor(fake, ONE, ONE)), EIGHT)


def more_recipes(folder: pathlib.Path) -> None:
    """Others of the same kinds."""
    whole = storage("0", 2)
    for name, arguments in {
        "beyond": (sizes(3), ONE),
        "overflow": (sizes(1 << 61, 16), sizes(16, 1)),
        "negative_stride": (sizes(2), sizes(-1)),
        "negative_size": (sizes(-1), ONE),
        "bool_size": (b"(\x88t", ONE),
        "float_size": (b"(G?\xf0\0\0\0\0\0\0t", ONE),
        "more_axes": (sizes(*[1] * 33), sizes(*[1] * 33)),
        "fewer_strides": (sizes(1, 1), ONE),
    }.items():
        save(folder / f"view_{name}.pt", one(tensor(whole, *arguments)), EIGHT)
    save(folder / "view_offset.pt", one(tensor(whole, ONE, ONE, int_(-1))), EIGHT)
    save(folder / "storage_short.pt", one(tensor(storage("0", 3), ONE, ONE)), EIGHT)
    save(folder / "storage_missing.pt", one(tensor(storage("1", 2), ONE, ONE)), EIGHT)
    save(folder / "expanded.pt", one(tensor(whole, sizes(10**9, 10**9), sizes(0, 0))), EIGHT)
    # Depth and sharing in values, not in keys.
    save(folder / "deep_lists.pt", one(b"]" * 200_000 + b"a" * 199_999))
    save(
        folder / "shared_tuples.pt",
        one(b"K\x01\x85" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(50))),
    )
    save(folder / "itself.pt", one(b"]q\0h\0a"))
    keys = b"".join(int_((1 << 61) * i - i) + b"N" for i in range(1, 60_000))
    save(folder / "colliding_keys.pt", b"}(" + keys + b"u")
    pairs = b"](" + b"K\1K\2\x86" * 20_000 + b"eq\0"
    copies = b"".join(b"ccollections\nOrderedDict\nh\0\x85R" for _ in range(5_000))
    save(folder / "copied_dicts.pt", one(b"(" + pairs + copies + b"t"))
    encode = b"(" + text("a" * 1_000_000) + b"q\0" + text("latin1") + b"q\1"
    save(folder / "encoded.pt", one(encode + b"c_codecs\nencode\nh\0h\1\x86R" * 20_000 + b"t"))
    # 200 tensors of one big-endian storage of 64 MB.
    large, count = bytes(1 << 26), 1 << 24
    views = b"".join(
        text(f"w{i}") + tensor(storage("0", count), sizes(count), ONE) for i in range(200)
    )
    save(folder / "big_endian.pt", b"}(" + views + b"u", {"byteorder": b"big", "data/0": large})
    # Names and keys that would write on the terminal.
    save(folder / "name_escape.pt", b"cos\x1b[31m\nsystem\x1b[2J\n)R")
    save(folder / "key_escape.pt", b"}" + text("\x1b[2Jforged\nerror: \u202e") + b"Ns")
    kinds = b"c__builtin__\neval\n" + text("open('evil', 'w')") + b"\x85R"
    save(folder / "eval.pt", one(kinds))
    # Members: one that unpacks to 64 MB, and one that is twice in the directory.
    write_torch(folder / "note_bomb.pt", {"w": np.ones(1, np.float32)})
    with zipfile.ZipFile(folder / "note_bomb.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/extra/config.json", bytes(64 << 20))
    write_torch(
        folder / "note_large.pt",
        {"w": np.ones(1, np.float32)},
        notes={"extra/config.json": b" " * (2 << 20)},
    )
    write_torch(
        folder / "note_deep.pt",
        {"w": np.ones(1, np.float32)},
        notes={"extra/config.json": b"[" * 100_000},
    )
    with pytest.warns(UserWarning), zipfile.ZipFile(folder / "twice.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data.pkl", b"\x80\x02}.")


def legacy_recipes(folder: pathlib.Path) -> None:
    """The format before PyTorch 1.6 is read by the same machine."""
    head = b"".join(
        pickle.dumps(part, protocol=2)
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    for name, program, keys in (
        ("dtype", one(dtype(64, 64), "x"), []),
        ("view", one(tensor(storage("0", 2), sizes(100), ONE)), ["0"]),
        ("other_keys", one(tensor(storage("0", 2), ONE, ONE)), ["1"]),
        ("keys_twice", one(tensor(storage("0", 2), ONE, ONE)), ["0", "0"]),
        ("huge", one(tensor(storage("0", 1 << 60), ONE, ONE)), ["0"]),
        ("memo", b"}r\0\0\0\x40", []),
        ("deep", b"})" + b"\x85" * 300_000 + b"Ns", []),
        ("code", b"cevil\nf\n)R", []),
    ):
        end = pickle.dumps(keys, protocol=2) + struct.pack("<q", 2) + bytes(8)
        (folder / f"legacy_{name}.pt").write_bytes(head + b"\x80\x02" + program + b"." + end)


def safetensors_recipes(folder: pathlib.Path) -> None:
    """Headers that the library itself refuses, and that no memory would be enough for."""

    def write(name: str, header: str | bytes, size: int = 8) -> None:
        raw = header.encode() if isinstance(header, str) else header
        data = struct.pack("<Q", len(raw)) + raw + bytes(size)
        (folder / f"{name}.safetensors").write_bytes(data)

    def entry(shape: str, begin: str, end: str) -> str:
        return f'{{"dtype": "F32", "shape": {shape}, "data_offsets": [{begin}, {end}]}}'

    write("negative", f'{{"a": {entry("[2]", "0", "8")}, "b": {entry("[2]", "-8", "0")}}}')
    write("overlapping", f'{{"a": {entry("[2]", "0", "8")}, "b": {entry("[1]", "4", "8")}}}')
    write("repeated", f'{{"a": {entry("[2]", "0", "8")}, "a": {entry("[2]", "0", "8")}}}')
    write("hole", f'{{"a": {entry("[1]", "4", "8")}}}')
    write("bool", f'{{"a": {entry("[true, 2]", "0", "8")}}}')
    write("float", f'{{"a": {entry("[2]", "0.0", "8")}}}')
    write("axes", f'{{"a": {entry("[" + ",".join("1" * 70) + ",2]", "0", "8")}}}')
    write(
        "twice_inside",
        '{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0,8]}}',
    )
    write("deep", '{"a":' + "[" * 100_000)
    write("number", '{"a": ' + "9" * 100_000 + "}")
    write("text", b'{"\xff": 1}')
    write("metadata", f'{{"__metadata__": {{"a": 1}}, "a": {entry("[2]", "0", "8")}}}')
    write("escape", '{"\\u001b[2J\\nerror: forged": 1}')
    (folder / "long.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")


# What is read all the same: the tensors that are there, with the hostile part left aside.
READ = {
    "big_endian.pt": {f"w{i}": [[1 << 24], 0.0] for i in range(200)},
    "note_bomb.pt": None,
    "colliding_keys.pt": None,
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, list]:
    """What one process says of each hostile file."""
    folder = tmp_path_factory.mktemp("hostile") / "files"
    folder.mkdir()
    issue_recipes(folder)
    more_recipes(folder)
    legacy_recipes(folder)
    safetensors_recipes(folder)
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "surrogate.json").write_text('{"a": "\\ud800"}')
    done = run_hostile(["-c", READ_ALL, str(folder)], folder.parent, seconds=60)
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert len(found) == len(list(folder.iterdir())) + 1
    return found


def test_each_is_refused_in_one_printable_line(reports):
    for name, (result, *_) in reports.items():
        if name in READ or name == "end":
            continue
        assert isinstance(result, str) and result.startswith("refused: "), (name, result)
        assert result.isprintable() and len(result) < 1500, (name, result)


def test_what_is_harmless_is_read(reports):
    assert reports["big_endian.pt"][0] == READ["big_endian.pt"]


def test_none_takes_long_or_much(reports):
    _, _, peak = reports["end"]
    assert peak < 2000  # MB
    slow = {name: rest[1] for name, rest in reports.items() if name != "end" and rest[1] > 10}
    assert not slow


def test_nothing_ran_and_nothing_changed(reports):
    imported, itemsizes, _ = reports["end"]
    assert imported == [] and itemsizes == [2, 1]


def test_the_reason_is_told(reports):
    expected = {
        "B.pt": "a size that is no tuple of integers",
        "O.pt": "a tensor whose storage is none",
        "M1.pt": "the memo's index 67,108,864 in a pickle of",
        "eval.pt": "wants to run code, builtins.eval",
        "expanded.pt": "expanded from 2 values",
        "name_escape.pt": r"os\x1b[31m.system\x1b[2J",
        "key_escape.pt": r"\x1b[2Jforged",
        "note_large.pt": "at most 1,048,576 bytes",
        "twice.pt": "a/data.pkl twice",
        "legacy_view.pt": "reaches beyond its storage",
        "repeated.safetensors": "a twice",
        "deep.json": "nested too deep",
    }
    for name, reason in expected.items():
        assert reason in reports[name][0], (name, reports[name][0])


def test_the_command_refuses_in_one_line(tmp_path):
    issue_recipes(tmp_path)
    command = ["-m", "convert", "--kind=dit", "--input=C.pt", "--output=out"]
    line = assert_refused(run_hostile(command, tmp_path))
    assert "C.pt" in line and not (tmp_path / "out").exists()
