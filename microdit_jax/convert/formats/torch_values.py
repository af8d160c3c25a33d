"""Makes values of the tokens that a pickle machine leaves: arrays, containers, plain values.

Every array is a view of a storage's real bytes, checked in Python's integers before it is made.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from microdit_jax.convert.formats import torch_names
from microdit_jax.convert.formats.pickle_tokens import (
    Call,
    Items,
    Name,
    PickleFault,
    StorageId,
    Table,
)
from microdit_jax.convert.formats.torch_names import DTYPE_OF_NAME, STORAGE_DTYPES

MAX_DEPTH = 100  # containers within each other
MAX_AXES = 32
MAX_REPEATED = 1 << 30  # bytes of all tensors that repeat (expand) what lies in their storage once
_TENSORS = (torch_names.TENSOR_NAMES - {"torch.Tensor"}) | torch_names.UNSUPPORTED.keys()
KEYS = (str, int, float, bytes, bool, type(None))


class LeftAside:
    """Something in a file that was not read: a date, a random state, a kind of tensor.

    Attributes:
      what: in words, or the class's name.
      is_tensor: True for a tensor of a kind that is not supported.
    """

    __slots__ = ("is_tensor", "what")

    def __init__(self, what: str, *, is_tensor: bool = False):
        self.what, self.is_tensor = what, is_tensor


class Values:
    """Makes the values of one file.

    Args:
      storage: (key) -> the bytes of a storage, mapped; raises KeyError if there are none.
      swapped: True if the elements are big-endian.
      most: containers and values that the contents may hold, counted as often as they are shared.

    Attributes:
      keys_of: id of an array -> key of its storage. The arrays live in the contents.
      left_aside: number of values that were left aside, by what they are.
    """

    def __init__(
        self, storage: Callable[[str], UInt8[np.ndarray, " b"]], *, swapped: bool, most: int
    ):
        self._storage, self._swapped, self._most = storage, swapped, most
        self._made: dict[int, tuple[Any, int]] = {}  # token's id -> its value and size
        self._alive: list[Any] = []  # tokens made here, so that no id is used twice
        self._native: dict[tuple[str, int], np.ndarray] = {}
        self._repeated = self._encoded = 0
        self.keys_of: dict[int, str] = {}
        self.left_aside: Counter[str] = Counter()

    def of(self, token: Any) -> Any:
        """Returns the value that a token stands for.

        Raises:
          PickleFault: tensors reach beyond their storages, or containers are nested too deep or
            shared too often.
        """
        return self._value(token, 0)[0]

    def _value(self, token: Any, depth: int) -> tuple[Any, int]:
        """A token's value, and its size: the number of values in it, shared ones each time."""
        if token is None or type(token) in KEYS:
            return token, 1
        if id(token) in self._made:
            return self._made[id(token)]
        if depth > MAX_DEPTH:
            raise PickleFault(f"more than {MAX_DEPTH} containers within each other")
        self._alive.append(token)
        self._made[id(token)] = LeftAside("a container inside itself"), 1
        value, size = self._make(token, depth + 1)
        if size > self._most:
            raise PickleFault("containers that are shared too often")
        self._made[id(token)] = value, size
        return value, size

    def _make(self, token: Any, depth: int) -> tuple[Any, int]:
        if type(token) is tuple:
            parts = [self._value(part, depth) for part in token]
            return tuple(value for value, _ in parts), 1 + sum(size for _, size in parts)
        if isinstance(token, Items) and not token.is_set:
            parts = [self._value(part, depth) for part in token.values]
            return [value for value, _ in parts], 1 + sum(size for _, size in parts)
        if isinstance(token, Table):
            found, total = {}, 1
            for key, value in token.pairs:
                # Only plain keys are hashed: integers of 64 bits cannot be made to collide.
                if type(key) not in KEYS or (type(key) is int and abs(key) >= 1 << 63):
                    self.left_aside["a key that is neither text nor number"] += 1
                    continue
                found[key], size = self._value(value, depth)
                total += 1 + size
            return found, total
        return self._object(token, depth)

    def _object(self, token: Any, depth: int) -> tuple[Any, int]:
        """The value of a call or a name: a tensor, a size, bytes, or what is left aside."""
        if not isinstance(token, Call):
            what = "a set" if isinstance(token, Items) else "a storage"
            return self._aside(token.text if isinstance(token, Name) else what), 1
        if token.name == torch_names.SIZE:
            return integers(token), 1 + len(token.arguments)
        if token.name == torch_names.ENCODE:  # how Python 2 keeps bytes: text in latin-1
            return self._bytes(token.arguments), 1
        if token.name == "builtins.bytes" and not token.arguments:
            return b"", 1
        if token.name in _TENSORS:
            return self._tensor(token.name, token.arguments, depth), 1
        return self._aside(token.name), 1

    def _aside(self, what: str, *, is_tensor: bool = False) -> LeftAside:
        what = torch_names.IN_WORDS.get(what, what)
        self.left_aside[f"a tensor that is {what}" if is_tensor else what] += 1
        return LeftAside(what, is_tensor=is_tensor)

    def _bytes(self, arguments: tuple) -> Any:
        text = arguments[0] if arguments else None
        if (
            type(text) is not str
            or len(arguments) != 2
            or arguments[1] not in ("latin1", "latin-1")
        ):
            return self._aside(torch_names.ENCODE)
        self._encoded += len(text)
        if self._encoded > self._most:
            raise PickleFault("texts that are shared too often")
        return text.encode("latin1")

    # --- tensors ---------------------------------------------------------------------------------

    def _tensor(self, name: str, arguments: tuple, depth: int) -> Any:
        """The array that one of torch's functions makes of its arguments."""
        if name in torch_names.UNSUPPORTED:
            return self._aside(torch_names.UNSUPPORTED[name], is_tensor=True)
        if name == torch_names.BY_TYPE and len(arguments) == 4:
            callable_, kind, inner, _ = arguments
            names = isinstance(callable_, Name) and isinstance(kind, Name)
            if not names or type(inner) is not tuple or depth > MAX_DEPTH:
                raise PickleFault("a tensor of a class, made by what is no name")
            if kind.text not in torch_names.PLAIN_TYPES:  # whose bytes may be codes
                return self._aside(f"of the class {kind.text}", is_tensor=True)
            return self._object(self._kept(Call(callable_.text, inner)), depth + 1)[0]
        if name in torch_names.WRAPPED and arguments:
            value, _ = self._value(arguments[0], depth)
            return value if isinstance(value, np.ndarray | LeftAside) else self._aside(name)
        if name in torch_names.STRIDED and len(arguments) >= 4:
            return self._strided(*arguments[:4], None, arguments[6:7])
        if name in torch_names.STRIDED_UNTYPED and len(arguments) >= 7:
            return self._strided(*arguments[:4], arguments[6], arguments[7:8])
        raise PickleFault(f"{name} with {len(arguments)} arguments")

    def _kept(self, token: Call) -> Call:
        self._alive.append(token)
        return token

    def _strided(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, marks: tuple
    ) -> Any:
        """The view of a storage that a tensor is, or what is left aside in its place.

        Args:
          offset, size, stride: in elements.
          dtype: of the tensor, if it states its own.
          marks: at most one dict, of bits for values that are to be negated or conjugated.
        """
        kind, key, count = storage_parts(storage)
        stated = dtype.text if isinstance(dtype, Name) else kind
        for name in (kind, stated):
            if name in torch_names.UNSUPPORTED_DTYPES:
                what = torch_names.UNSUPPORTED_DTYPES[name]
                return self._aside(f"of {what}", is_tensor=True)
        if marks and not (isinstance(marks[0], Table) and not marks[0].pairs):
            return self._aside("negated or conjugated when read", is_tensor=True)
        stored = STORAGE_DTYPES[kind]
        found = stored if dtype is None else DTYPE_OF_NAME.get(stated)
        if found is None:
            raise PickleFault(f"a tensor of the type {stated!r}")
        item = torch_names.element_size(kind)
        data = self._storage(key)
        if count * item > len(data):
            raise PickleFault(f"a storage of {count * item:,} bytes, found {len(data):,}")
        view = self._view(key, data, found, offset, integers(size), integers(stride))
        if isinstance(view, np.ndarray):
            self.keys_of[id(view)] = key
        return view

    def _view(
        self,
        key: str,
        data: UInt8[np.ndarray, " b"],
        dtype: np.dtype,
        offset: Any,
        size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> Any:
        """The array at `offset` (in elements) of a storage, checked to lie within it."""
        if type(offset) is not int or len(size) != len(stride) or len(size) > MAX_AXES:
            raise PickleFault("a tensor whose offset, size and stride do not fit")
        count = len(data) // dtype.itemsize
        if min(size, default=1) == 0:
            return np.zeros(size, dtype)
        last = offset + sum((s - 1) * t for s, t in zip(size, stride, strict=True))
        if offset < 0 or min(size, default=1) < 0 or min(stride, default=0) < 0 or last >= count:
            raise PickleFault(f"a tensor {size} reaches beyond its storage of {count}")
        repeated = (math.prod(size) - (last - offset + 1)) * dtype.itemsize
        self._repeated += max(0, repeated)
        if self._repeated > MAX_REPEATED:
            self._repeated -= max(0, repeated)
            return self._aside(f"{size}, expanded from {count} values", is_tensor=True)
        if self._swapped and dtype.itemsize > 1:
            data = self._swap(key, data, dtype.itemsize)
        # The stride of an axis of one element is never used, and may be any.
        steps = [(t if s > 1 else 1) * dtype.itemsize for s, t in zip(size, stride, strict=True)]
        # NumPy checks once more that the view lies within the buffer.
        return np.ndarray(size, dtype, data.data, offset * dtype.itemsize, steps)

    def _swap(self, key: str, data: np.ndarray, itemsize: int) -> np.ndarray:
        """A big-endian storage's bytes in this machine's order: one copy for all its tensors."""
        if (key, itemsize) not in self._native:
            whole = data[: len(data) // itemsize * itemsize]
            words = whole.view(np.dtype(f">u{itemsize}")).astype(f"=u{itemsize}")
            words.flags.writeable = False
            self._native[key, itemsize] = words.view(np.uint8)
        return self._native[key, itemsize]


def storage_parts(token: Any) -> tuple[str, str, int]:
    """Returns a storage's type by name, its key, and its number of elements.

    Raises:
      PickleFault: the token is no storage, or a damaged one.
    """
    parts: tuple[Any, ...] = token.parts if isinstance(token, StorageId) else ()
    # Before 1.6 there is a sixth part, of None.
    if len(parts) not in (5, 6) or parts[0] != "storage" or any(parts[5:]):
        raise PickleFault("a tensor whose storage is none")
    kind, key, _location, count = parts[1:5]
    known = STORAGE_DTYPES.keys() | torch_names.UNSUPPORTED_DTYPES.keys()
    if not isinstance(kind, Name) or kind.text not in known:
        raise PickleFault("a storage of an unknown type")
    if type(key) not in (str, int) or type(count) is not int or not 0 <= count < 1 << 62:
        raise PickleFault("a storage whose key or size is none")
    return kind.text, str(key), count


def integers(token: Any) -> tuple[int, ...]:
    """A size or stride: exact integers, which nothing can make overflow."""
    if isinstance(token, Call) and token.name == torch_names.SIZE and len(token.arguments) == 1:
        token = token.arguments[0]
    values: Any = token.values if isinstance(token, Items) else token
    if type(values) not in (tuple, list) or len(values) > MAX_AXES:
        raise PickleFault("a size that is no tuple of integers")
    if not all(type(value) is int and abs(value) < 1 << 62 for value in values):
        raise PickleFault("a size that is no tuple of integers")
    return tuple(values)
