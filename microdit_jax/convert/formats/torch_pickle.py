"""The names that a PyTorch file may use when it is unpickled: tensors and containers, no code.

A pickle is a program that calls what it names. Here each name that tensors are pickled with stands
for a function of ours, and every other name is refused before anything is called.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from microdit_jax.errors import UserError

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


class _StandIn:
    """A function that a pickle can call but not change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args):
        return self._call(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError("a stand-in cannot be changed")


class Opaque:
    """An object of a training checkpoint that is no tensor (a date, a random state): unread."""

    __slots__ = ()

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state):
        pass


class Storage(NamedTuple):
    """The bytes of one or more tensors.

    Attributes:
      data: (b,) uint8, in the mapped file.
      dtype: of its elements; None if each tensor states its own.
      swapped: True if the elements are big-endian.
    """

    data: UInt8[np.ndarray, " b"]
    dtype: np.dtype | None
    swapped: bool


def _view(storage: Storage, dtype: np.dtype, offset: int, size: tuple, stride: tuple):
    """Returns the tensor at `offset` (in elements) of a storage, checked to lie within it."""
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


class Unpickler(pickle.Unpickler):
    """Unpickles tensors, and refuses every name that they are not pickled with.

    Args:
      path: the file, for errors.
      storage: (key, dtype or None, number of elements) -> Storage.
    Raises:
      UserError: the pickle wants to run code.
    """

    def __init__(self, file: io.BufferedIOBase, path: Path, storage: Callable):
        super().__init__(file, encoding="utf-8")
        self._path, self._storage = path, storage

    def find_class(self, module: str, name: str) -> Any:
        """Returns our stand-in for a name; raises UserError for any other."""
        if (module, name) not in _GLOBALS:
            raise UserError(
                f"{self._path} is refused: expected tensors only, found that it wants to run code, "
                f"{module}.{name}; save the state dict alone, torch.save(model.state_dict(), FILE)"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """Returns the storage that a pickle refers to."""
        kind, dtype, key, _location, count, *view = pid  # before 1.6 there is a view, of None
        if kind != "storage" or not (dtype is None or isinstance(dtype, np.dtype)) or any(view):
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        return self._storage(key, dtype, count)
