"""Inert tokens that stand for a pickle's calls, containers and storages.

They have slots and no methods, so a pickle can neither change them nor be called back by them.
"""

from typing import Any


class PickleFault(ValueError):
    """A pickle that is damaged, or uses what no file of tensors needs."""


class Name:
    """A class or function that a pickle names: "torch._utils._rebuild_tensor_v2", as text."""

    __slots__ = ("text",)

    def __init__(self, text: str):
        self.text = text


class Call:
    """A call that a pickle asks for: the callable's name and its arguments, never carried out.

    Attributes:
      state: a token of what would become the object's attributes, where the machine keeps it.
    """

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple):
        self.name, self.arguments = name, arguments
        self.state: Any = None


class Items:
    """A list, or a set, being filled."""

    __slots__ = ("is_set", "values")

    def __init__(self, is_set: bool = False):
        self.values: list[Any] = []
        self.is_set = is_set


class Table:
    """A dict being filled: pairs in the order in which they were set."""

    __slots__ = ("pairs",)

    def __init__(self):
        self.pairs: list[tuple[Any, Any]] = []


class StorageId:
    """The persistent id by which a pickle refers to the bytes of tensors."""

    __slots__ = ("parts",)

    def __init__(self, parts: tuple):
        self.parts = parts
