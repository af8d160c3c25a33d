"""Reads the text of optimised HLO into computations and instructions.

The text is what `jax.stages.Compiled.as_text()` gives on every backend. Only what our counts need
is kept: shapes, operands, called computations, and the raw attributes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bits of an element; types that are not here (token, opaque) take no memory.
BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8,
}  # fmt: skip

_LEAF = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (?=\S)")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Which attributes name computations that run when the instruction does; `to_apply` of a reduction
# is no program of its own.
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|true_computation|false_computation|"
    r"branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's element type and sizes; on_chip: it lies in a TPU's vector memory."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> float:
        """Of all elements; types smaller than a byte count as they are packed."""
        return self.elements * BITS.get(self.dtype, 0) / 8


@dataclasses.dataclass(eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: of its result; several for a tuple, nested ones flattened.
      operands: names of instructions of the same computation.
      arguments: the text between its parentheses; what a constant or parameter is.
      attributes: the text after them.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the Python program it comes from, by JAX's name stack; "" if nobody says."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        """Names of computations by the attribute that names them."""
        head = self.attributes.split("metadata={")[0].split("backend_config=")[0]
        found = {}
        for kind, names in _CALLED.findall(head):
            found[kind] = re.findall(r"[\w.\-]+", names.replace("%", ""))
        return found

    @property
    def num_bytes(self) -> float:
        """Of its result."""
        return sum((shape.num_bytes for shape in self.shapes), 0.0)

    def attribute(self, name: str) -> str | None:
        """The value of `name=`, up to the next comma or the end of its braces."""
        match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(eq=False)
class Computation:
    """A function of the module: its instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.arguments))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who takes an instruction's result."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in users:
                    users[operand].append(instruction)
        return users

    def operand_shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        """The shapes of what an instruction of this computation takes."""
        return [self.instructions[name].shapes for name in instruction.operands]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(eq=False)
class Module:
    """All computations of a program; `entry` is where it starts."""

    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """A module from its text.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry, current = {}, None, None
    for line in _whole_lines(text):
        if current is None:
            if line.endswith("{") and "->" in line:
                head = line.removeprefix("ENTRY ").lstrip("%")
                current = Computation(re.match(r"[\w.\-]+", head)[0], {})
                computations[current.name] = current
                if line.startswith("ENTRY "):
                    entry = current
        elif _ends_computation(line):
            current = None
        elif (instruction := _instruction(line)) is not None:
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"expected the text of an HLO module, found {text[:80]!r}")
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, those of one instruction as one.

    A Pallas kernel's metadata goes on in the first column, and may start with a closing brace.
    """
    pending = ""  # an instruction that may go on
    for line in text.splitlines():
        if pending and line[:1] not in ("", " ") and not _ends_computation(line):
            pending += f" {line}"
            continue
        if pending:
            yield pending
            pending = ""
        if line.startswith("  "):
            pending = line
        else:
            yield line
    if pending:
        yield pending


def _ends_computation(line: str) -> bool:
    return line == "}" or line.startswith("}, execution_thread=")


def _instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    end = _closing(line, start.end()) if line[start.end()] == "(" else line.index(" ", start.end())
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    last = _closing(line, opcode.end() - 1)
    arguments = line[opcode.end() : last - 1]
    shapes = _LEAF.findall(_COMMENT.sub("", line[start.end() : end]))
    return Instruction(
        name=start[2],
        opcode=opcode[1],
        shapes=tuple(
            Shape(t, tuple(map(_size, filter(None, d.split(",")))), "S(1)" in layout)
            for t, d, layout in shapes
        ),
        operands=tuple(_NAME.findall(arguments)) if opcode[1] != "constant" else (),
        arguments=arguments,
        attributes=line[last:],
        is_root=bool(start[1]),
    )


def _size(text: str) -> int:
    return int(text.removeprefix("<="))  # a size known only by its bound


def _closing(line: str, start: int) -> int:
    """Just after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", line[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    raise ValueError(f"unbalanced parentheses in {line[:120]!r}")
