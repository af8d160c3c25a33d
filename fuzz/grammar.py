"""Mutations that keep a format: JSON with other values, pickles with other opcodes.

Bytes changed at random are mostly refused by the parser; these reach what stands behind it.
"""

import json
import pickletools
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

Mutate = Callable[[random.Random, bytes, Sequence[bytes]], bytes | None]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**32 - 1, 2**63, -(2**63), 10**30, 1.5, -0.0),
    *(1e308, float("nan"), float("inf"), "", "0", "a", "../x", "/dev/zero", ".", "a/../../x"),
    *("\x1b[2J\nerror: forged\r", "\ud800", "\0", "x" * 300, "é", [], {}, [[]], [0], {"a": {}}),
)


# ------------------------------------------------------------------ JSON
def json_document(chance: random.Random, data: bytes, words: Sequence[bytes]) -> bytes | None:
    """Changes values in a JSON document; None where the input is none."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return None
    for _ in range(chance.choice((1, 1, 2, 4))):
        _change(chance, root)
    try:
        return json.dumps(root[0]).encode()
    except (RecursionError, ValueError):
        return None


def json_lines(chance: random.Random, data: bytes, words: Sequence[bytes]) -> bytes | None:
    """Changes one line of JSON among others."""
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    changed = json_document(chance, lines[at], words)
    return None if changed is None else b"\n".join([*lines[:at], changed, *lines[at + 1 :]])


def after_a_byte(mutate: Mutate) -> Mutate:
    """Returns the same mutation of inputs whose first byte chooses a reader."""

    def changed(chance: random.Random, data: bytes, words: Sequence[bytes]) -> bytes | None:
        rest = mutate(chance, data[1:], words)
        return None if rest is None else data[:1] + rest

    return changed


def safetensors(chance: random.Random, data: bytes, words: Sequence[bytes]) -> bytes | None:
    """Changes values in the header of a .safetensors file, and its length with them."""
    size = int.from_bytes(data[:8], "little")
    header = json_document(chance, data[8 : 8 + size], words)
    if header is None:
        return None
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _change(chance: random.Random, root: list[Any]) -> None:
    """Changes one place of a tree, whose root lies in a list of its own."""
    places = _places(root)
    parent, key = chance.choice(places)
    kind = chance.randrange(8)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
    elif kind == 1 and parent is not root:
        if isinstance(parent, dict):
            parent[str(chance.choice(VALUES))] = parent[key]
        else:
            parent.append(parent[key])
    elif kind == 2:
        other, from_key = chance.choice(places)
        if from_key in (other if isinstance(other, dict) else range(len(other))):
            parent[key] = json.loads(json.dumps(other[from_key]))
    elif kind == 3:
        parent[key] = [parent[key]]
    elif kind == 4 and type(parent[key]) is int:
        parent[key] += chance.choice((-1, 1, 2, 8, -8))
    else:
        parent[key] = json.loads(json.dumps(chance.choice(VALUES)))


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    found, waiting = [], [root]
    while waiting and len(found) < 500:
        node = waiting.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    return found


# ------------------------------------------------------------------ pickles
def pickles(chance: random.Random, data: bytes, words: Sequence[bytes]) -> bytes | None:
    """Moves, repeats, leaves out and puts in opcodes of one or several pickles in a row."""
    if data[:2] == b"PK":
        return None
    parts = _opcodes(data)
    if len(parts) < 2:
        return None
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, end = sorted(chance.choices(range(len(parts)), k=2))
        end = min(end, at + 12) + 1
        kind = chance.randrange(6)
        if kind == 0:
            del parts[at : chance.choice((at + 1, end))]
        elif kind == 1:
            to = chance.randrange(len(parts))
            parts[to:to] = parts[at:end]
        elif kind == 2:
            parts[at], parts[end - 1] = parts[end - 1], parts[at]
        elif kind == 3:
            parts[at] = chance.choice(parts)
        elif kind == 4:
            parts[at] = _number(chance)
        else:
            parts.insert(at, chance.choice(words))
        if not parts:
            return None
    return b"".join(parts)


def _number(chance: random.Random) -> bytes:
    value = chance.choice(
        (0, 1, 2, 3, 4, 8, 63, 64, 65, 255, 2**31 - 1, -1, 2**62, 2**63, -(2**63))
    )
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def _opcodes(data: bytes) -> list[bytes]:
    """Splits pickles in a row into their opcodes; what follows them is one part."""
    starts, begin = [], 0
    try:
        while begin < len(data):
            end = begin
            for opcode, _, position in pickletools.genops(data[begin:]):
                starts.append(begin + (position or 0))
                end = begin + (position or 0) + 1
                if opcode.name == "STOP":
                    break
            begin = end
    except Exception:  # whatever the bytes are, they are one part from here on
        pass
    starts = sorted({0, *starts, begin if begin < len(data) else 0})
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
