"""Reads and writes PyTorch's .pt files without PyTorch, and without running what they contain.

Since version 1.6 such a file is an uncompressed zip (legacy_torch_file.py has the older format):
`NAME/data.pkl` pickles the objects, and every tensor's storage is a member `NAME/data/KEY` of plain
bytes, which can be memory-mapped where it lies. The pickle is read as data (pickle_machine.py), and
torch_names.py says which of its names stand for tensors; a file that wants to run anything else is
refused.
"""

import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt8

from microdit_jax.convert.formats.file_bytes import byte_chunks, map_bytes
from microdit_jax.convert.formats.legacy_torch_file import MAGIC, load_legacy
from microdit_jax.convert.formats.pickle_machine import PickleMachine
from microdit_jax.convert.formats.torch_names import DTYPES, STORAGES, check_name
from microdit_jax.convert.formats.torch_values import Values
from microdit_jax.convert.formats.zip_members import NotAZipError, ZipMembers
from microdit_jax.errors import UserError, visible
from microdit_jax.files import atomic_file

ALIGNMENT = 64  # bytes; of each storage within the file, as torch.save has it
MAX_NOTE = 1 << 20  # bytes of a member that is read as text


# --- reading -----------------------------------------------------------------------------------


def _not_a_zip(path: Path, head: bytes) -> UserError:
    if head.startswith(b"PK"):
        found, fix = "a zip without its end, so it is truncated", "fetch it again"
    elif head.lstrip().startswith((b"<", b"{")):
        found, fix = "a web page or text", "fetch the file itself"
    else:
        found, fix = f"bytes {head[:4].hex(' ')}", "check that this is the right file"
    return UserError(f"expected a .pt file (zip) at {visible(path)}, found {found}; {fix}")


def _open_zip(path: Path, data: UInt8[np.ndarray, " b"]) -> ZipMembers:
    try:
        return ZipMembers(path, data)
    except NotAZipError as error:
        raise _not_a_zip(path, bytes(data[:64])) from error


class TorchFile:
    """Reads what `torch.save` wrote, all but the tensors' bytes.

    Args:
      data: the bytes to read, where they are only a part of the file.

    Attributes:
      contents: usually a dict, nested as saved, of arrays: read-only views of the mapped file in
        the type and with the strides they were saved with (bfloat16 is ml_dtypes'); tensors that
        shared a storage share it again. What is no tensor, container, number or text is a
        LeftAside.
      notes: what was left aside, in words.
    Raises:
      UserError: the file is truncated, damaged, or wants to run code.
    """

    def __init__(self, path: str | os.PathLike, data: UInt8[np.ndarray, " b"] | None = None):
        self.path = path = Path(path)
        data = map_bytes(path) if data is None else data
        self._zip: ZipMembers | None = None
        if data[: len(MAGIC)].tobytes() == MAGIC:
            machine = PickleMachine(data.data, lambda name: check_name(path, name))
            self._values, self.contents = undamaged(path, lambda: load_legacy(path, machine, data))
            self.notes = []
        else:
            self._zip = _open_zip(path, data)
            self._values, self.contents = self._read_zip(self._zip)
            self.notes = [] if self._zip.has_checksums else [_WITHOUT_CHECKSUMS]
        if aside := self._values.left_aside:
            shown = ", ".join(f"{count} x {what}" for what, count in aside.most_common(8))
            more = f" and {len(aside) - 8} kinds more" if len(aside) > 8 else ""
            self.notes.append(f"left aside what is no tensor: {visible(shown, 1000)}{more}")

    def _read_zip(self, members: ZipMembers) -> tuple[Values, Any]:
        pickles = [name for name in members.names() if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise UserError(
                f"expected a .pt file at {visible(self.path)}, found a zip with {len(pickles)} "
                "data.pkl; check that this is the right file"
            )
        self._root = pickles[0].split("/")[0]
        if f"{self._root}/constants.pkl" in members:
            raise UserError(
                f"expected tensors in {visible(self.path)}, found a program of TorchScript; save "
                "its weights: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
            )
        order = f"{self._root}/byteorder"
        members.verify([pickles[0], order] if order in members else [pickles[0]])
        swapped = order in members and members[order][:16].tobytes().strip() == b"big"
        program = members[pickles[0]]
        values = Values(
            lambda key: members[self._member(key)],
            swapped=swapped,
            most=max(1_000_000, 8 * len(program)),
        )

        def load():
            machine = PickleMachine(program.data, lambda name: check_name(self.path, name))
            return values.of(machine.load()[0])

        return values, undamaged(self.path, load)

    def _member(self, key: str) -> str:
        return f"{self._root}/data/{key}"

    def verify(self, arrays: Iterable[Shaped[np.ndarray, "..."]]) -> None:
        """Compares the bytes below some of the contents' arrays to the file's checksums.

        Raises:
          UserError: they are not those that were written.
        """
        if self._zip is not None:
            keys = self._values.keys_of
            self._zip.verify(self._member(keys[id(a)]) for a in arrays if id(a) in keys)

    def verify_all(self) -> None:
        """Compares the bytes below all arrays, as `verify` does."""
        if self._zip is not None:
            self._zip.verify(self._member(key) for key in self._values.keys_of.values())


_WITHOUT_CHECKSUMS = "the file was saved without checksums, so damage to its values cannot be seen"


def read_torch(path: str | os.PathLike) -> Any:
    """Returns the contents of a TorchFile, with all of its checksums verified.

    Raises:
      UserError: the file is truncated, damaged, or wants to run code.
    """
    file = TorchFile(path)
    file.verify_all()
    return file.contents


def read_member(path: Path, name: str) -> bytes | None:
    """Returns a small member of a .pt file, such as a note beside its tensors; None if none.

    Raises:
      UserError: the member is damaged, or larger than MAX_NOTE.
    """
    try:
        members = ZipMembers(path)
    except NotAZipError:
        return None
    if name not in members:
        return None
    if len(member := members[name]) > MAX_NOTE:
        raise UserError(
            f"expected at most {MAX_NOTE:,} bytes in {visible(name)} of {visible(path)}, found "
            f"{len(member):,}; fetch it again"
        )
    members.verify([name])
    return member.tobytes()


def undamaged(path: Path, load: Callable[[], Any]) -> Any:
    """Calls `load`; raises UserError if the pickle or a storage is damaged."""
    try:
        return load()
    except UserError:
        raise
    except (ValueError, LookupError, MemoryError, RecursionError, struct.error) as error:
        reason = error
    raise UserError(
        f"expected pickled tensors in {visible(path)}, found damaged contents "
        f"({type(reason).__name__}: {visible(reason)}); fetch it again"
    ) from reason


# --- writing -----------------------------------------------------------------------------------


def _int(value: int) -> bytes:
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _tuple(parts: list[bytes]) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _pickle_tensor(key: str, shape: tuple[int, ...], storage: str) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    count = int(np.prod(shape, dtype=np.int64))
    strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    location = [_text("storage"), b"ctorch\n%s\n" % storage.encode(), _text(key), _text("cpu")]
    arguments = [
        _tuple([*location, _int(count)]) + b"Q",
        _int(0),
        _tuple([_int(n) for n in shape]),
        _tuple([_int(n) for n in strides]),
        b"\x89",
        b"ccollections\nOrderedDict\n)R",
    ]
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(arguments) + b"R"


def _member(archive: zipfile.ZipFile, name: str, size: int) -> zipfile.ZipInfo:
    """Makes a stored member's header, padded so that its bytes begin at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.file_size = size
    zip64 = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0  # zipfile adds that field itself
    assert archive.fp is not None  # it is open
    start = archive.fp.tell() + 30 + len(name.encode()) + zip64 + 4
    info.extra = b"FB" + struct.pack("<H", -start % ALIGNMENT) + b"Z" * (-start % ALIGNMENT)
    return info


def write_torch(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str | None = None,
    notes: Mapping[str, bytes] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Writes a state dict that `torch.load(path, weights_only=True)` reads.

    Streams tensor by tensor, so no second copy is held; the file appears only once it is complete.

    Args:
      tensors: name -> array of a type in DTYPES; views are written as they look.
      dtype: floating types are cast to this ("float32", "bfloat16", "float16"); None keeps them.
      notes: further members (name -> bytes), which PyTorch ignores.
      progress: called with the number of bytes just written.
    Raises:
      UserError: a type PyTorch cannot hold, or the disk is full.
    """
    kinds = {name: output_dtype(tensor, dtype) for name, tensor in tensors.items()}
    names = {kind: name for name, kind in STORAGES.items()}
    for name, kind in kinds.items():
        if kind not in names:
            raise UserError(
                f"a .pt file holds {', '.join(map(str, names))}; found {kind} at {name}"
            )
    body = b"".join(
        _text(name) + _pickle_tensor(str(i), tensor.shape, names[kinds[name]])
        for i, (name, tensor) in enumerate(tensors.items())
    )
    program = b"\x80\x02ccollections\nOrderedDict\n)R(" + body + b"u."
    total = sum(tensor.size * kinds[name].itemsize for name, tensor in tensors.items())
    small = {"data.pkl": program, "byteorder": b"little", **(notes or {}), "version": b"3\n"}
    with atomic_file(path, total) as file, zipfile.ZipFile(file, "w") as archive:
        for name, data in small.items():
            archive.writestr(_member(archive, f"archive/{name}", len(data)), data)
        for i, (name, tensor) in enumerate(tensors.items()):
            size = tensor.size * kinds[name].itemsize
            with archive.open(_member(archive, f"archive/data/{i}", size), "w") as member:
                for chunk in byte_chunks(name, tensor, kinds[name]):
                    member.write(chunk)
                    if progress:
                        progress(len(chunk))


def output_dtype(tensor: Shaped[np.ndarray, "..."], dtype: str | None) -> np.dtype:
    """Returns the type a tensor is written in: `dtype` for floating ones, else its own."""
    is_float = tensor.dtype.kind == "f" or tensor.dtype == ml_dtypes.bfloat16
    return np.dtype(DTYPES[dtype][0]) if dtype and is_float else tensor.dtype.newbyteorder("=")
