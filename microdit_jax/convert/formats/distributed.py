"""Reads the folders of torch.distributed.checkpoint, in which sharded training programs save.

`.metadata` pickles dataclasses that say where each tensor's chunks lie: a file `__RANK_N.distcp`,
an offset and a length. What lies there is the chunk as torch.save writes it (filesystem.py and
metadata.py of torch.distributed.checkpoint). The pickle is read as data, as those of .pt files are.
"""

import math
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from microdit_jax.convert.formats import torch_names
from microdit_jax.convert.formats.file_bytes import map_bytes
from microdit_jax.convert.formats.pickle_machine import PickleMachine
from microdit_jax.convert.formats.pickle_tokens import Call, Items, Name, PickleFault, Table
from microdit_jax.convert.formats.torch_file import TorchFile, undamaged
from microdit_jax.convert.formats.torch_values import LeftAside, integers
from microdit_jax.errors import UserError, visible

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint"
_CLASSES = frozenset(
    {
        *(f"{_MODULE}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *(f"{_MODULE}.metadata.{kind}StorageMetadata" for kind in ("Bytes", "Chunk", "Tensor")),
        f"{_MODULE}.metadata.TensorProperties",
        f"{_MODULE}.metadata._MEM_FORMAT_ENCODING",
        f"{_MODULE}.filesystem._StorageInfo",
    }
)
MAX_CHUNKS = 4096  # of one tensor
MAX_DEPTH = 16  # of keys that lead to a tensor
CONVERT = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"


def is_distributed(folder: Path) -> bool:
    """Returns True for a folder that torch.distributed.checkpoint wrote."""
    return (folder / METADATA).is_file()


class _Chunk(NamedTuple):
    """A part of a tensor: its corner and size within it, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class DistributedCheckpoint:
    """Reads which tensors a folder holds; their values only when they are asked for.

    Attributes:
      contents: nested as saved. In the tensors' places are arrays of their shapes and types without
        values, which `load` replaces.
      notes: what was left aside, in words.
    Raises:
      UserError: the folder is damaged or incomplete, or wants to run code.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.path = self.folder / METADATA
        self._chunks: dict[int, list[_Chunk]] = {}  # by the id of the array in `contents`
        self._data: dict[str, np.ndarray] = {}
        self.notes: list[str] = []
        self.contents = undamaged(self.path, self._read)

    def _read(self) -> dict[str, Any]:
        machine = PickleMachine(map_bytes(self.path).data, self._check_name, keep_states=True)
        about = _attributes(machine.load()[0], "Metadata")
        places = self._places(about.get("storage_data"))
        tensors: dict[str, Any] = {}
        aside = 0
        for name, value in _pairs(about.get("state_dict_metadata")):
            kind = value.name.rsplit(".")[-1] if isinstance(value, Call) else ""
            if type(name) is not str or kind not in (
                "TensorStorageMetadata",
                "BytesStorageMetadata",
            ):
                raise PickleFault("a tensor without a name or a size")
            if kind == "BytesStorageMetadata":
                aside += 1
                continue
            tensors[name] = self._tensor(name, _attributes(value, kind), places)
        if aside:
            self.notes.append(f"left aside {aside} values that are no tensors")
        return _nested(tensors, about.get("planner_data"))

    def _check_name(self, name: str) -> None:
        if name not in _CLASSES:
            torch_names.check_name(self.path, name)

    def _places(self, storage: Any) -> dict[tuple[str, tuple[int, ...]], Mapping[str, Any]]:
        """Places of all chunks, by its tensor's name and its offset."""
        places = {}
        for index, place in _pairs(storage):
            key = _attributes(index, "MetadataIndex")
            if (offset := key.get("offset")) is not None and type(key.get("fqn")) is str:
                places[key["fqn"], integers(offset)] = _attributes(place, "_StorageInfo")
        return places

    def _tensor(self, name: str, about: Mapping[str, Any], places: Mapping) -> Any:
        """An array of a tensor's shape and type without values, whose chunks were found good."""
        properties = about.get("properties")
        state = properties.state if isinstance(properties, Call) else None
        dtype_name = state[0].text if type(state) is tuple and isinstance(state[0], Name) else ""
        if what := torch_names.UNSUPPORTED_DTYPES.get(dtype_name):
            return LeftAside(f"of {what}", is_tensor=True)
        if (dtype := torch_names.DTYPE_OF_NAME.get(dtype_name)) is None:
            raise PickleFault(f"{visible(name, 200)} without a type")
        size = integers(about.get("size"))
        listed = about.get("chunks")
        if not isinstance(listed, Items) or not 0 < len(listed.values) <= MAX_CHUNKS:
            raise PickleFault(f"{visible(name, 200)} without chunks")
        chunks = [self._chunk(name, item, places, dtype) for item in listed.values]
        _check_tiling(name, size, chunks)
        stand_in = np.broadcast_to(np.zeros((), dtype), size)
        self._chunks[id(stand_in)] = chunks
        return stand_in

    def _chunk(self, name: str, token: Any, places: Mapping, dtype: np.dtype) -> _Chunk:
        about = _attributes(token, "ChunkStorageMetadata")
        offsets, sizes = integers(about.get("offsets")), integers(about.get("sizes"))
        place = places.get((name, offsets))
        if place is None:
            raise PickleFault(f"no place of {visible(name, 200)} at {offsets}")
        file, start, length = (place.get(k) for k in ("relative_path", "offset", "length"))
        if type(file) is not str or type(start) is not int or type(length) is not int:
            raise PickleFault(f"no place of {visible(name, 200)} at {offsets}")
        if place.get("transform_descriptors"):
            raise self._unsupported("compressed chunks")
        if min(sizes, default=0) < 0 or length < math.prod(sizes) * dtype.itemsize:
            raise PickleFault(f"{visible(name, 200)} of {sizes} in {length} bytes")
        if start < 0 or start + length > len(self._bytes_of(file)):
            raise PickleFault(f"{visible(name, 200)} beyond the end of {visible(file, 200)}")
        return _Chunk(offsets, sizes, file, start, length)

    def _bytes_of(self, file: str) -> np.ndarray:
        """A file's bytes, mapped; only a plain name, which is in this folder, is opened."""
        if file not in self._data:
            if file != os.path.basename(file) or file in ("", ".", ".."):
                raise PickleFault(f"chunks in {visible(file, 200)}, outside of the folder")
            self._data[file] = map_bytes(self.folder / file)
        return self._data[file]

    def load(self, stand_in: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Returns the tensor for an array of `contents`: a view of its file if it is in one chunk.

        Raises:
          UserError: the bytes are damaged.
        """
        chunks = self._chunks[id(stand_in)]
        if len(chunks) == 1:
            return self._values(chunks[0], stand_in.dtype)
        whole = np.empty(stand_in.shape, stand_in.dtype)
        for chunk in chunks:
            ends = [start + count for start, count in zip(chunk.offsets, chunk.sizes, strict=True)]
            window = tuple(map(slice, chunk.offsets, ends))
            whole[window] = self._values(chunk, stand_in.dtype)
        return whole

    def _values(self, chunk: _Chunk, dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
        data = self._bytes_of(chunk.file)[chunk.start : chunk.start + chunk.length]
        if bytes(data[:2]) != b"PK":
            raise self._unsupported("chunks that torch.save did not write")
        file = TorchFile(self.folder / chunk.file, data)
        found = file.contents
        if not isinstance(found, np.ndarray) or (found.dtype, found.shape) != (dtype, chunk.sizes):
            raise UserError(
                f"expected {dtype} of {chunk.sizes} at byte {chunk.start} of "
                f"{visible(self.folder / chunk.file)}, found something else; fetch the folder again"
            )
        file.verify_all()
        return found

    def _unsupported(self, found: str) -> UserError:
        return UserError(
            f"expected tensors as torch.save writes them in {visible(self.folder)}, found {found}; "
            f"make one file of them: {CONVERT}"
        )


def _attributes(token: Any, kind: str) -> dict[str, Any]:
    """The attributes of a dataclass of this name."""
    if not isinstance(token, Call) or token.name not in _CLASSES:
        raise PickleFault(f"no {kind}")
    if token.name.rsplit(".")[-1] != kind or not isinstance(token.state, Table):
        raise PickleFault(f"no {kind}")
    return {key: value for key, value in token.state.pairs if type(key) is str}


def _pairs(token: Any) -> list[tuple[Any, Any]]:
    if not isinstance(token, Table):
        raise PickleFault("no dict of its tensors")
    return token.pairs


def _check_tiling(name: str, size: tuple[int, ...], chunks: list[_Chunk]) -> None:
    """Raises PickleFault unless the chunks fill the tensor, each element once."""
    for chunk in chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(size):
            raise PickleFault(f"{visible(name, 200)} {size} in chunks of other axes")
        ends = [start + count for start, count in zip(chunk.offsets, chunk.sizes, strict=True)]
        if min(chunk.offsets, default=0) < 0 or any(map(operator.gt, ends, size)):
            raise PickleFault(f"{visible(name, 200)} {size} in chunks that reach beyond it")
    begins = np.array([chunk.offsets for chunk in chunks], np.int64)
    ends = begins + np.array([chunk.sizes for chunk in chunks], np.int64)
    for i in range(len(chunks) - 1):
        apart = (ends[i] <= begins[i + 1 :]) | (ends[i + 1 :] <= begins[i])
        if not apart.any(axis=-1).all():
            raise PickleFault(f"{visible(name, 200)} {size} in chunks that overlap")
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise PickleFault(f"{visible(name, 200)} {size} in chunks that leave gaps")


def _nested(tensors: dict[str, Any], planner: Any) -> dict[str, Any]:
    """Nests tensors as they were before saving, where the file says how: by paths of keys."""
    paths: dict[str, tuple[str, ...]] = {}
    for name, path in _pairs(planner) if isinstance(planner, Table) else ():
        keys = path if type(path) is tuple and 0 < len(path) <= MAX_DEPTH else ()
        if type(name) is str and keys and all(type(key) in (str, int) for key in keys):
            paths[name] = tuple(map(str, keys))
    result: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *outer, last = paths.get(name, (name,))
        level = result
        for key in outer:
            level = level.setdefault(key, {})
            if not isinstance(level, dict):
                raise PickleFault(f"{visible(name, 200)} within a tensor")
        if last in level:
            raise PickleFault(f"{visible(name, 200)} where something else is")
        level[last] = tensor
    return result
