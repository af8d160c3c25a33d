"""Mutations by chance, where no coverage can guide them."""

import random
from collections.abc import Sequence

from fuzz.grammar import Mutate

NUMBERS = [
    value.to_bytes(width, "little")
    for width in (1, 2, 4, 8)
    for value in (0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1)
]


def mutated(
    chance: random.Random,
    seeds: Sequence[bytes],
    words: Sequence[bytes],
    most: int,
    grammar: Mutate | None = None,
) -> bytes:
    """Returns an input made of one or two seeds by a few changes.

    Args:
      words: pieces of the format that are put in.
      most: bytes of an input.
      grammar: makes every other input.
    """
    seed = chance.choice(seeds)
    if grammar and chance.random() < 0.5:
        if found := grammar(chance, seed, words):
            return found[:most]
    data = bytearray(seed)
    if chance.random() < 0.1:
        other = chance.choice(seeds)
        data = data[: chance.randint(0, len(data))] + other[chance.randint(0, len(other)) :]
    for _ in range(chance.choice((1, 1, 2, 3, 5, 8))):
        at = chance.randint(0, len(data))
        kind = chance.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] = chance.randrange(256)
        elif kind == 1 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del data[at : at + chance.choice((1, 2, 4, 16, 64))]
        elif kind == 3:
            part = data[at : at + chance.choice((1, 4, 16, 64))]
            data[at:at] = part * chance.choice((1, 2, 8))
        elif kind == 4:
            number = chance.choice(NUMBERS)
            data[at : at + len(number)] = number
        elif words:
            data[at:at] = chance.choice(words)
    return bytes(data[:most])
