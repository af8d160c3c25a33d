"""Reads and writes PyTorch's .pt files without PyTorch, and without running what they contain.

Since version 1.6 such a file is an uncompressed zip (legacy_torch_file.py has the older format):
`NAME/data.pkl` pickles the objects, and every tensor's storage is a member `NAME/data/KEY` of plain
bytes, which can be memory-mapped where it lies. Only the few names that tensors are pickled with
are known here; all are mapped to functions of ours, so a file that wants to run anything else is
refused by construction.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from microdit_jax.convert.formats.file_bytes import byte_chunks, map_bytes
from microdit_jax.convert.formats.legacy_torch_file import MAGIC, load_legacy
from microdit_jax.errors import UserError
from microdit_jax.files import atomic_file

# torch.X -> numpy, and the class that older pickles name a storage of that type by.
DTYPES = {
    "float32": (np.float32, "FloatStorage"),
    "float64": (np.float64, "DoubleStorage"),
    "float16": (np.float16, "HalfStorage"),
    "bfloat16": (ml_dtypes.bfloat16, "BFloat16Storage"),
    "int64": (np.int64, "LongStorage"),
    "int32": (np.int32, "IntStorage"),
    "int16": (np.int16, "ShortStorage"),
    "int8": (np.int8, "CharStorage"),
    "uint8": (np.uint8, "ByteStorage"),
    "bool": (np.bool_, "BoolStorage"),
    "uint16": (np.uint16, None),
    "uint32": (np.uint32, None),
    "uint64": (np.uint64, None),
    "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, None),
    "float8_e5m2": (ml_dtypes.float8_e5m2, None),
}
STORAGES = {storage: np.dtype(kind) for kind, storage in DTYPES.values() if storage}
ALIGNMENT = 64  # of each storage within the file, as torch.save has it


# --- the names a pickle may use ----------------------------------------------------------------


class _StandIn:
    """A callable that a pickle can call but not change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args):
        return self._call(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError("a stand-in cannot be changed")


class Opaque:
    """Something in a training checkpoint that is not a tensor (a date, a random state): unread."""

    __slots__ = ()

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state):
        pass


class _Storage(NamedTuple):
    data: np.ndarray  # (bytes,) uint8, in the mapped file
    dtype: np.dtype | None  # None: untyped
    swapped: bool


def _view(storage: _Storage, dtype: np.dtype, offset: int, size: tuple, stride: tuple):
    """The tensor at offset (in elements) of a storage, checked to lie within it."""
    count = len(storage.data) // dtype.itemsize
    last = offset + sum((s - 1) * t for s, t in zip(size, stride, strict=True))
    if 0 in size:
        return np.zeros(size, dtype)
    if offset < 0 or min(size, default=1) < 0 or min(stride, default=0) < 0 or last >= count:
        raise pickle.UnpicklingError(f"a tensor {size} reaches beyond its storage of {count}")
    flat = storage.data[: count * dtype.itemsize]
    if storage.swapped:
        flat = flat.reshape(count, dtype.itemsize)[:, ::-1].reshape(-1)
    flat = flat.view(dtype)[offset:]
    strides = [t * dtype.itemsize for t in stride]
    return np.lib.stride_tricks.as_strided(flat, size, strides, writeable=False)


def _rebuild_tensor(storage, offset, size, stride, *_):
    return _view(storage, storage.dtype, offset, tuple(size), tuple(stride))


def _rebuild_untyped(storage, offset, size, stride, requires_grad, hooks, dtype, *_):
    return _view(storage, dtype, offset, tuple(size), tuple(stride))


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _StandIn(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _StandIn(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _StandIn(_rebuild_untyped),
    ("torch._utils", "_rebuild_parameter"): _StandIn(lambda data, *_: data),
    ("torch._utils", "_rebuild_parameter_with_state"): _StandIn(lambda data, *_: data),
    ("torch._tensor", "_rebuild_from_type_v2"): _StandIn(lambda call, kind, args, _: call(*args)),
    ("torch.nn.parameter", "Parameter"): _StandIn(lambda data=None, *_: data),
    ("torch", "Tensor"): _StandIn(lambda data=None, *_: data),
    ("torch", "Size"): _StandIn(tuple),
    ("torch", "device"): _StandIn(lambda *args: ":".join(map(str, args))),
    ("torch.storage", "UntypedStorage"): None,
    ("torch", "UntypedStorage"): None,
    ("_codecs", "encode"): _StandIn(lambda text, _: text.encode("latin1")),  # how bytes are kept
}
_GLOBALS |= {("torch", name): dtype for name, dtype in STORAGES.items()}
_GLOBALS |= {("torch", name): np.dtype(dtype) for name, (dtype, _) in DTYPES.items()}
_GLOBALS |= {
    (module, name): Opaque
    for module, names in {
        "numpy": ("dtype", "ndarray"),
        "numpy.core.multiarray": ("_reconstruct", "scalar"),
        "numpy._core.multiarray": ("_reconstruct", "scalar"),
        "datetime": ("datetime", "timedelta", "timezone"),
    }.items()
    for name in names
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedIOBase, path: Path, storage: Callable):
        super().__init__(file, encoding="utf-8")
        self._path, self._storage = path, storage

    def find_class(self, module: str, name: str):
        if (module, name) not in _GLOBALS:
            raise UserError(
                f"{self._path} is refused: expected tensors only, found that it wants to run code, "
                f"{module}.{name}; save the state dict alone, torch.save(model.state_dict(), FILE)"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _location, count, *view = pid  # before 1.6 there is a view, of None
        if kind != "storage" or not (dtype is None or isinstance(dtype, np.dtype)) or any(view):
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        return self._storage(key, dtype, count)


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
    """What `torch.save` wrote: usually a dict, nested as saved, of numpy arrays.

    Tensors are read-only views of the memory-mapped file, in the type and with the strides they
    were saved with; tensors that shared a storage share it again. bfloat16 is ml_dtypes'.

    Raises:
      UserError: the file is truncated, damaged, or wants to run code.
    """
    path = Path(path)
    if bytes((data := map_bytes(path))[: len(MAGIC)]) == MAGIC:

        def load(file: io.BufferedIOBase, storage: Callable) -> Any:
            return _Unpickler(file, path, storage).load()

        return _undamaged(path, lambda: load_legacy(path, data, load, _Storage))
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

    def storage(key: str, dtype: np.dtype | None, _: int) -> _Storage:
        return _Storage(archive[f"{root}/data/{key}"], dtype, swapped)

    file = io.BytesIO(archive[pickles[0]].tobytes())
    return _undamaged(path, lambda: _Unpickler(file, path, storage).load())


def _undamaged(path: Path, load: Callable[[], Any]) -> Any:
    """What `load` gives; a UserError where the pickle or a storage is not whole."""
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
    """A stored member's header, padded so that its bytes begin at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.file_size = size
    zip64 = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0  # zipfile adds that field itself
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
    """The type a tensor is written in: `dtype` for floating ones, else its own."""
    is_float = tensor.dtype.kind == "f" or tensor.dtype == ml_dtypes.bfloat16
    return np.dtype(DTYPES[dtype][0]) if dtype and is_float else tensor.dtype.newbyteorder("=")
