"""Reads the format of PyTorch before 1.6, which some public weights still have.

Five pickles (a magic number, the version, the machine, the object, the keys of its storages), then
for each key the number of elements and the bytes, little-endian whatever the machine was
(torch/csrc/serialization.cpp).
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from microdit_jax.convert.formats.pickle_machine import PickleMachine
from microdit_jax.convert.formats.pickle_tokens import Items, PickleFault
from microdit_jax.convert.formats.torch_names import element_size
from microdit_jax.convert.formats.torch_values import Values, storage_parts
from microdit_jax.errors import UserError, visible

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle
VERSION = 1001


def load_legacy(
    path: Path, machine: PickleMachine, data: UInt8[np.ndarray, " b"]
) -> tuple[Values, Any]:
    """Reads the contents of such a file.

    Args:
      machine: for the pickles in `data`.
      data: the file's bytes, mapped; tensors are views of them.
    Returns:
      What made the values, and the contents.
    Raises:
      UserError: another version, or truncated.
      PickleFault: damaged.
    """
    _, position = machine.load(0)
    version, position = machine.load(position)
    if type(version) is not int or version != VERSION:
        found = version if type(version) is int else "none"
        raise UserError(
            f"expected version {VERSION} of the format before PyTorch 1.6 in {visible(path)}, "
            f"found {found}; re-save it with a newer one: "
            "torch.save(torch.load(FILE), NEW_FILE)"
        )
    _, begin = machine.load(position)  # about the machine
    contents, end = machine.load(begin)
    elements = {}  # number and size of each storage's elements, by its key
    for token in machine.storages:
        kind, key, count = storage_parts(token)
        elements[key] = (count, element_size(kind))
    listed, position = machine.load(end)
    storages: dict[str, np.ndarray] = {}
    for key in listed.values if isinstance(listed, Items) else ():
        if type(key) not in (str, int) or str(key) not in elements or str(key) in storages:
            raise PickleFault("keys of other storages than its tensors have")
        count, size = elements[key := str(key)]
        written = data[position : position + 8].tobytes()
        start, position = position + 8, position + 8 + count * size
        if written != struct.pack("<q", count) or position > len(data):
            raise _truncated(path)
        storages[key] = data[start:position]
    if storages.keys() != elements.keys():
        raise _truncated(path)
    most = max(1_000_000, 8 * (end - begin))
    values = Values(storages.__getitem__, swapped=False, most=most)
    return values, values.of(contents)


def _truncated(path: Path) -> UserError:
    return UserError(
        f"expected storages as large as the tensors in {visible(path)}, found it truncated or "
        "damaged; fetch it again"
    )
