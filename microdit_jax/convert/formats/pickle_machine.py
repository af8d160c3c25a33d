"""Reads a pickle as data: a machine that only ever puts inert tokens on its stack.

A pickle is a program: its names are imported, called, and given a state. This machine calls
nothing. A name stays a name, a call stays the name and its arguments, and what is set on an object
is dropped (or kept as a token beside the call), so whatever the program says, numbers, texts and
tokens are all that comes out of it.
torch_values.py makes arrays of those tokens that stand for tensors.

OPCODES is the whole language: what is not in that table is refused. Everything is bounded: opcodes,
memo, integers and names; containers are never hashed, compared or printed, so nesting and sharing
cost nothing.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from microdit_jax.convert.formats.pickle_tokens import (
    Call,
    Items,
    Name,
    PickleFault,
    StorageId,
    Table,
)

MAX_STEPS = 10_000_000  # 10 million numbers, or a million containers, at about 500 bytes each
CONTAINER = 10  # steps that a container or a call counts
MAX_NAME = 1000  # bytes of one name of a module or class


# Callables that give an empty dict; the first argument may be pairs (OrderedDict in Python 2).
DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})
# Modules that Python 3 names otherwise; torch.save writes Python 2's names.
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class PickleMachine:
    """Runs the pickles of one file.

    Args:
      data: the file's bytes, or a part of them.
      check_name: called with every name before it is put on the stack; raises to refuse it.
      keep_states: keep what is set on an object as the call's `state`, for objects that are data.
    """

    def __init__(
        self, data: memoryview, check_name: Callable[[str], Any], *, keep_states: bool = False
    ):
        self.data, self.check_name, self.keep_states = data, check_name, keep_states
        self.position, self.steps = 0, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.storages: list[StorageId] = []  # all that the pickles referred to

    def load(self, position: int = 0) -> tuple[Any, int]:
        """Runs one pickle from a position on.

        Returns:
          Its token (None, bool, int, float, str, bytes, tuple or one of this module's classes), and
          the position after it.
        Raises:
          PickleFault: the pickle is damaged, too large, or uses an opcode that is not in OPCODES.
        """
        self.position = position
        self.stack, self.marks, self.memo = [], [], {}
        data, run = self.data, _RUN
        while True:
            if self.position >= len(data):
                raise PickleFault("a pickle without its end")
            code = data[self.position]
            self.position += 1
            self.steps += _STEPS[code]
            if self.steps > MAX_STEPS:
                raise PickleFault(f"a pickle of more than {MAX_STEPS:,} steps")
            if code == STOP:
                token = self.pop()
                self.stack, self.memo = [], {}
                return token, self.position
            if (step := run[code]) is None:
                raise PickleFault(f"the opcode {code:#04x}, which no file of tensors needs")
            step(self)

    # --- reading ---------------------------------------------------------------------------------

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        end = self.position + count
        if end > len(self.data):
            raise PickleFault(f"{count:,} bytes beyond the end of the pickle")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, layout: struct.Struct) -> Any:
        """The next number, in the layout of `struct`."""
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> str:
        """The next line of text, a part of a name."""
        head = bytes(self.data[self.position : self.position + MAX_NAME])
        length = head.find(b"\n")
        if length < 0:
            raise PickleFault("a name without an end")
        self.position += length + 1
        return head[:length].decode()

    # --- the stack -------------------------------------------------------------------------------

    def push(self, token: Any) -> None:
        """Puts a token on the stack."""
        self.stack.append(token)

    def pop(self) -> Any:
        """Takes the uppermost token, which must lie above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleFault("a stack with too little on it")
        return self.stack.pop()

    def top(self) -> Any:
        """The uppermost token, which stays."""
        self.push(token := self.pop())
        return token

    def pop_mark(self) -> list[Any]:
        """Takes all tokens above the last mark, and the mark."""
        if not self.marks:
            raise PickleFault("a stack without a mark")
        height = self.marks.pop()
        tokens = self.stack[height:]
        del self.stack[height:]
        return tokens

    def pop_tuple(self, count: int) -> None:
        """Replaces the uppermost `count` tokens by a tuple of them."""
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    # --- containers ------------------------------------------------------------------------------

    def append(self, tokens: list[Any]) -> None:
        """Adds to the list or set on top of the stack; what is no container drops them."""
        target = self.top()
        if isinstance(target, Items):
            target.values.extend(tokens)
        elif not isinstance(target, Call):  # an object that is a list besides is left aside
            raise PickleFault(f"items for a {type(target).__name__}")

    def set_items(self, tokens: list[Any]) -> None:
        """Sets key, value, key, value, ... in the dict on top of the stack."""
        target = self.top()
        if len(tokens) % 2:
            raise PickleFault("a key without a value")
        if isinstance(target, Table):
            target.pairs.extend(zip(tokens[::2], tokens[1::2], strict=True))
        elif not isinstance(target, Call):
            raise PickleFault(f"keys for a {type(target).__name__}")

    # --- names, calls and the memo ---------------------------------------------------------------

    def name(self, module: Any, name: Any) -> None:
        """Puts a name on the stack, once it is known to be allowed."""
        if type(module) is not str or type(name) is not str:
            raise PickleFault("a name that is no text")
        text = f"{RENAMED.get(module, module)}.{name}"
        self.check_name(text)
        self.push(Name(text))

    def call(self) -> None:
        """Replaces a name and a tuple of arguments by a token of the call, or by an empty dict."""
        arguments, callable_ = self.pop(), self.pop()
        if not isinstance(callable_, Name) or type(arguments) is not tuple:
            raise PickleFault("a call of what is no name, or of no arguments")
        if callable_.text not in DICTS:
            return self.push(Call(callable_.text, arguments))
        table = Table()
        first = arguments[0] if arguments else None
        if isinstance(first, Table):
            table.pairs.extend(first.pairs)
        elif isinstance(first, Items):
            pairs = [x.values if isinstance(x, Items) else x for x in first.values]
            if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
                raise PickleFault("a dict of what are no pairs")
            table.pairs.extend(map(tuple, pairs))
        self.steps += len(table.pairs)  # copies of one long list cost as much as a long pickle
        self.push(table)

    def call_with_keywords(self) -> None:
        """Does what `call` does, and drops a dict of keyword arguments."""
        keywords = self.pop()
        if not isinstance(keywords, Table):
            raise PickleFault("keyword arguments that are no dict")
        self.call()

    def drop_state(self) -> None:
        """Drops what would become an object's attributes, or keeps it where that was asked for."""
        state, target = self.pop(), self.top()
        if not isinstance(target, Call | Table | Items):
            raise PickleFault("a state for what is no object")
        if self.keep_states and isinstance(target, Call):
            target.state = state

    def storage(self) -> None:
        """Replaces a persistent id by the token of a storage."""
        parts = self.pop()
        if type(parts) is not tuple:
            raise PickleFault("a persistent id that is no tuple")
        self.push(token := StorageId(parts))
        self.storages.append(token)

    def remember(self, index: int) -> None:
        """Keeps the uppermost token; an index beyond the pickle's length is damage."""
        if index >= len(self.data):
            raise PickleFault(f"the memo's index {index:,} in a pickle of {len(self.data):,} bytes")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        """Puts a token on the stack that was kept before."""
        if index not in self.memo:
            raise PickleFault(f"the memo's index {index:,}, where nothing was put")
        self.push(self.memo[index])


def _text(machine: PickleMachine, count: int) -> None:
    # torch.save writes lone surrogates as Python does; no name of a tensor has any.
    machine.push(str(machine.take(count), "utf-8", "surrogatepass"))


def _old_text(machine: PickleMachine, count: int) -> None:
    """A str of Python 2: text where it is UTF-8, else bytes."""
    raw = bytes(machine.take(count))
    try:
        machine.push(raw.decode())
    except UnicodeDecodeError:
        machine.push(raw)


def _bytes(machine: PickleMachine, count: int) -> None:
    machine.push(bytes(machine.take(count)))


def _protocol(machine: PickleMachine) -> None:
    if (version := machine.number(_U1)) > 5:
        raise PickleFault(f"a pickle of protocol {version}")


def _integer(machine: PickleMachine) -> None:
    machine.push(int.from_bytes(machine.take(machine.number(_U1)), "little", signed=True))


def _stack_name(machine: PickleMachine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _pair(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


class Opcode(NamedTuple):
    """One allowed opcode: its name in `pickletools`, what it does here, and why it is needed."""

    name: str
    run: Callable[[PickleMachine], Any]
    why: str


_U1, _U2, _U4, _U8 = (struct.Struct(layout) for layout in ("<B", "<H", "<I", "<Q"))
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
STOP = ord(".")  # ends a pickle; the one opcode that `load` itself carries out

OPCODES: dict[int, Opcode] = {
    0x80: Opcode("PROTO", _protocol, "begins every pickle of protocol 2 and up"),
    0x95: Opcode("FRAME", lambda m: m.take(8), "protocol 4; only a hint for buffering"),
    # Values: numbers, texts and bytes, as long as the pickle itself has bytes for them.
    ord("N"): Opcode("NONE", lambda m: m.push(None), "optional arguments"),
    0x88: Opcode("NEWTRUE", lambda m: m.push(True), "requires_grad"),
    0x89: Opcode("NEWFALSE", lambda m: m.push(False), "requires_grad"),
    ord("J"): Opcode("BININT", lambda m: m.push(m.number(_I4)), "sizes, strides, steps"),
    ord("K"): Opcode("BININT1", lambda m: m.push(m.number(_U1)), "sizes, strides, steps"),
    ord("M"): Opcode("BININT2", lambda m: m.push(m.number(_U2)), "sizes, strides, steps"),
    0x8A: Opcode("LONG1", _integer, "sizes beyond 2**31; at most 255 bytes, so it is quick"),
    ord("G"): Opcode("BINFLOAT", lambda m: m.push(m.number(_F8)), "learning rates, losses"),
    ord("X"): Opcode("BINUNICODE", lambda m: _text(m, m.number(_U4)), "names, keys of storages"),
    0x8C: Opcode("SHORT_BINUNICODE", lambda m: _text(m, m.number(_U1)), "names in protocol 4"),
    0x8D: Opcode("BINUNICODE8", lambda m: _text(m, m.number(_U8)), "long texts in protocol 4"),
    ord("T"): Opcode("BINSTRING", lambda m: _old_text(m, m.number(_U4)), "text from Python 2"),
    ord("U"): Opcode("SHORT_BINSTRING", lambda m: _old_text(m, m.number(_U1)), "text, Python 2"),
    ord("B"): Opcode("BINBYTES", lambda m: _bytes(m, m.number(_U4)), "random states, protocol 3"),
    ord("C"): Opcode("SHORT_BINBYTES", lambda m: _bytes(m, m.number(_U1)), "as BINBYTES"),
    0x8E: Opcode("BINBYTES8", lambda m: _bytes(m, m.number(_U8)), "as BINBYTES, protocol 4"),
    0x96: Opcode("BYTEARRAY8", lambda m: _bytes(m, m.number(_U8)), "as BINBYTES, protocol 5"),
    # Containers, which are filled and never looked into.
    ord("("): Opcode("MARK", lambda m: m.marks.append(len(m.stack)), "begins what TUPLE takes"),
    ord("0"): Opcode("POP", lambda m: m.pop(), "pickle's way out of a tuple that holds itself"),
    ord("1"): Opcode("POP_MARK", lambda m: m.pop_mark(), "as POP, for longer tuples"),
    ord(")"): Opcode("EMPTY_TUPLE", lambda m: m.push(()), "shapes of scalars; no arguments"),
    ord("t"): Opcode("TUPLE", lambda m: m.push(tuple(m.pop_mark())), "shapes, arguments"),
    0x85: Opcode("TUPLE1", lambda m: m.pop_tuple(1), "shapes, arguments"),
    0x86: Opcode("TUPLE2", lambda m: m.pop_tuple(2), "shapes, arguments"),
    0x87: Opcode("TUPLE3", lambda m: m.pop_tuple(3), "shapes, arguments"),
    ord("]"): Opcode("EMPTY_LIST", lambda m: m.push(Items()), "groups of an optimiser"),
    ord("a"): Opcode("APPEND", lambda m: m.append([m.pop()]), "fills a list with one item"),
    ord("e"): Opcode("APPENDS", lambda m: m.append(m.pop_mark()), "fills a list"),
    ord("}"): Opcode("EMPTY_DICT", lambda m: m.push(Table()), "state dicts"),
    ord("s"): Opcode("SETITEM", _pair, "fills a dict of one key"),
    ord("u"): Opcode("SETITEMS", lambda m: m.set_items(m.pop_mark()), "fills a dict"),
    0x8F: Opcode("EMPTY_SET", lambda m: m.push(Items(is_set=True)), "sets in protocol 4"),
    0x90: Opcode("ADDITEMS", lambda m: m.append(m.pop_mark()), "fills a set"),
    0x91: Opcode(
        "FROZENSET", lambda m: (m.pop_mark(), m.push(Items(is_set=True))), "left aside whole"
    ),
    # Names and calls, which stay tokens.
    ord("c"): Opcode("GLOBAL", lambda m: m.name(m.line(), m.line()), "names what a call is of"),
    0x93: Opcode("STACK_GLOBAL", _stack_name, "as GLOBAL, protocol 4"),
    ord("R"): Opcode("REDUCE", PickleMachine.call, "every tensor is such a call"),
    0x81: Opcode("NEWOBJ", PickleMachine.call, "objects beside the tensors; parameters"),
    0x92: Opcode("NEWOBJ_EX", PickleMachine.call_with_keywords, "as NEWOBJ, protocol 4"),
    ord("b"): Opcode("BUILD", PickleMachine.drop_state, "_metadata of every state dict"),
    ord("Q"): Opcode("BINPERSID", PickleMachine.storage, "refers to a tensor's bytes"),
    # The memo.
    ord("q"): Opcode("BINPUT", lambda m: m.remember(m.number(_U1)), "shared names and storages"),
    ord("r"): Opcode("LONG_BINPUT", lambda m: m.remember(m.number(_U4)), "as BINPUT"),
    0x94: Opcode("MEMOIZE", lambda m: m.remember(len(m.memo)), "as BINPUT, protocol 4"),
    ord("h"): Opcode("BINGET", lambda m: m.recall(m.number(_U1)), "shared names and storages"),
    ord("j"): Opcode("LONG_BINGET", lambda m: m.recall(m.number(_U4)), "as BINGET"),
}
_CONTAINERS = b")t\x85\x86\x87]}\x8f\x91R\x81\x92Q"
_STEPS = [CONTAINER if code in _CONTAINERS else 1 for code in range(256)]
_RUN = [OPCODES[code].run if code in OPCODES else None for code in range(256)]
