"""Parses the text of optimised HLO into computations and instructions.

The text is what `jax.stages.Compiled.as_text()` returns on every backend. The parser keeps only
what the counts need: shapes, operands, called computations, and the raw attributes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bits of one element. Types that are not listed (token, opaque) take no memory.
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
# Attributes that name the computations an instruction runs.
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|true_computation|false_computation|"
    r"branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Element type and dimensions of an array; `on_chip` if it lies in a TPU's vector memory."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> float:
        """Size in bytes; types smaller than a byte count as packed."""
        return self.elements * BITS.get(self.dtype, 0) / 8


@dataclasses.dataclass(eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: shapes of the result; several for a tuple, nested tuples flattened.
      operands: names of the instructions of the same computation whose results it takes.
      arguments: text between the parentheses: a constant's value, a parameter's number.
      attributes: text after the closing parenthesis.
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
        """JAX's name stack at the operation it was compiled from; "" if there is none."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        """Names of the computations it runs, by the attribute that lists them."""
        head = self.attributes.split("metadata={")[0].split("backend_config=")[0]
        found: dict[str, list[str]] = {}
        for kind, names in _CALLED.findall(head):
            found[kind] = re.findall(r"[\w.\-]+", names.replace("%", ""))
        return found

    @property
    def num_bytes(self) -> float:
        """Size of the result in bytes."""
        return sum((shape.num_bytes for shape in self.shapes), 0.0)

    def attribute(self, name: str) -> str | None:
        """Value of the attribute `name=`, up to the next comma or the end of its braces."""
        match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(eq=False)
class Computation:
    """A function of the module: its instructions by name, in the order they are scheduled."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """Instruction whose result is the computation's result."""
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Parameters, sorted by their numbers."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.arguments))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that take each instruction's result, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in users:
                    users[operand].append(instruction)
        return users

    def operand_shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        """Shapes of each operand of an instruction of this computation."""
        return [self.instructions[name].shapes for name in instruction.operands]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(eq=False)
class Module:
    """All computations of a program; it starts in `entry`.

    Attributes:
      devices: number of devices that run the program together.
    """

    computations: dict[str, Computation]
    entry: Computation
    devices: int


def parse(text: str) -> Module:
    """Parses the text of a module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    current: Computation | None = None
    for line in _whole_lines(text):
        if current is None:
            if line.endswith("{") and "->" in line:
                name = re.split(r"[^\w.\-]", line.removeprefix("ENTRY ").lstrip("%"))[0]
                current = computations[name] = Computation(name, {})
                if line.startswith("ENTRY "):
                    entry = current
        elif _ends_computation(line):
            current = None
        elif (instruction := _instruction(line)) is not None:
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"expected the text of an HLO module, found {text[:80]!r}")
    head = text.partition("\n")[0]
    counts = re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", head)
    return Module(computations, entry, math.prod(map(int, counts)))


def _whole_lines(text: str) -> Iterator[str]:
    """Yields the lines of the text, all lines of one instruction joined.

    A Pallas kernel's metadata continues in the first column, and may start with a closing brace.
    """
    pending = ""  # an instruction that may continue on the next line
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
    return int(text.removeprefix("<="))  # a dynamic dimension: its upper bound


def _closing(line: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", line[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    raise ValueError(f"unbalanced parentheses in {line[:120]!r}")
