"""Reads and writes PyTorch's .pt files without PyTorch, and without running what they contain.

Since version 1.6 such a file is an uncompressed zip (legacy_torch_file.py has the older format):
`NAME/data.pkl` pickles the objects, and every tensor's storage is a member `NAME/data/KEY` of plain
bytes, which can be memory-mapped where it lies. torch_pickle.py knows the few names that tensors
are pickled with, so a file that wants to run anything else is refused by construction.
"""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from microdit_jax.convert.formats.file_bytes import byte_chunks, map_bytes
from microdit_jax.convert.formats.legacy_torch_file import MAGIC, load_legacy
from microdit_jax.convert.formats.torch_pickle import DTYPES, STORAGES, Storage, Unpickler
from microdit_jax.errors import UserError
from microdit_jax.files import atomic_file

ALIGNMENT = 64  # bytes; of each storage within the file, as torch.save has it


# --- reading -----------------------------------------------------------------------------------


def _not_a_zip(path: Path, head: bytes) -> UserError:
    if head.startswith(b"PK"):
        found, fix = "a zip without its end, so it is truncated", "fetch it again"
    elif head.startswith(b"version https://git-lfs"):
        found, fix = "a Git LFS pointer", "fetch the real file: git lfs pull"
    elif head.lstrip().startswith((b"<", b"{")):
        found, fix = "a web page or text", "fetch the file itself"
    else:
        found, fix = f"bytes {head[:4].hex(' ')}", "check that this is the right file"
    return UserError(f"expected a .pt file (zip) at {path}, found {found}; {fix}")


class _Archive:
    """The members of an uncompressed zip, as slices of the mapped file."""

    def __init__(self, path: Path):
        self.path, self.data = path, map_bytes(path)
        try:
            with zipfile.ZipFile(path) as archive:
                self.members = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, struct.error, ValueError) as error:
            raise _not_a_zip(path, bytes(self.data[:64])) from error

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UserError(
                f"expected uncompressed members in {self.path}, found {name} compressed or "
                "encrypted; re-save it with torch.save"
            )
        # The local header repeats the name and has its own extra field (torch pads with it), so
        # only the header itself tells where the bytes begin.
        header = bytes(self.data[info.header_offset : info.header_offset + 30])
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise UserError(f"expected {name} in {self.path}, found other bytes; fetch it again")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > len(self.data):
            raise UserError(
                f"expected {info.file_size} bytes of {name} in {self.path}, found "
                f"{len(self.data) - start}; fetch it again"
            )
        return self.data[start : start + info.file_size]


def read_torch(path: str | os.PathLike) -> Any:
    """Reads what `torch.save` wrote: usually a dict, nested as saved, of NumPy arrays.

    Tensors are read-only views of the memory-mapped file, in the type and with the strides they
    were saved with; tensors that shared a storage share it again. bfloat16 is ml_dtypes'.

    Raises:
      UserError: the file is truncated, damaged, or wants to run code.
    """
    path = Path(path)
    if bytes((data := map_bytes(path))[: len(MAGIC)]) == MAGIC:

        def load(file: io.BufferedIOBase, storage: Callable) -> Any:
            return Unpickler(file, path, storage).load()

        return _undamaged(path, lambda: load_legacy(path, data, load, Storage))
    archive = _Archive(path)
    pickles = [name for name in archive.members if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise UserError(
            f"expected a .pt file at {path}, found a zip with {len(pickles)} data.pkl; "
            "check that this is the right file"
        )
    root = pickles[0].split("/")[0]
    order = f"{root}/byteorder"
    swapped = order in archive.members and bytes(archive[order]).strip() == b"big"

    def storage(key: str, dtype: np.dtype | None, _: int) -> Storage:
        return Storage(archive[f"{root}/data/{key}"], dtype, swapped)

    file = io.BytesIO(archive[pickles[0]].tobytes())
    return _undamaged(path, lambda: Unpickler(file, path, storage).load())


def _undamaged(path: Path, load: Callable[[], Any]) -> Any:
    """Calls `load`; raises UserError if the pickle or a storage is damaged."""
    try:
        return load()
    except UserError:
        raise
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError) as error:
        reason = error
    except (ValueError, OverflowError, MemoryError, RecursionError, struct.error) as error:
        reason = error
    raise UserError(
        f"expected pickled tensors in {path}, found damaged contents "
        f"({type(reason).__name__}: {reason}); fetch it again"
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
                for chunk in byte_chunks(tensor, kinds[name]):
                    member.write(chunk)
                    if progress:
                        progress(len(chunk))


def output_dtype(tensor: Shaped[np.ndarray, "..."], dtype: str | None) -> np.dtype:
    """Returns the type a tensor is written in: `dtype` for floating ones, else its own."""
    is_float = tensor.dtype.kind == "f" or tensor.dtype == ml_dtypes.bfloat16
    return np.dtype(DTYPES[dtype][0]) if dtype and is_float else tensor.dtype.newbyteorder("=")
