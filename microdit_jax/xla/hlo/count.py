"""What a compiled program does, counted from its optimised HLO.

  counts = hlo.count(compiled.as_text())
  counts.flops, counts.collectives, counts.kernels

Loops count as often as they run, and of a conditional's branches the one that moves most bytes.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from microdit_jax.xla.hlo.collectives import COLLECTIVES, Collective, collective
from microdit_jax.xla.hlo.matmuls import product_flops
from microdit_jax.xla.hlo.text import Computation, Instruction, Module, Shape, parse

# Neither computes nor moves anything.
_FREE = {
    "slice-done",
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
    "opt-barrier", "partition-id", "replica-id", "iota", "copy-done", "async-done", "async-update",
    *(f"{kind}-done" for kind in COLLECTIVES), "send-done", "recv-done", "add-dependency",
}  # fmt: skip
# Read only as much of an operand as they return.
_SLICES = ("slice", "dynamic-slice", "gather")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one instruction does each time, and how often it runs.

    flops: of matrix products, by the operands' type. num_bytes: read from and written to memory.
    """

    name: str
    opcode: str
    op_name: str
    times: int
    flops: dict[str, float]
    num_bytes: float


@dataclasses.dataclass(frozen=True)
class Counts:
    """All kernels and exchanges of a program on one device.

    uncounted: kernels from outside XLA whose operations nobody knows, by name.
    """

    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    uncounted: dict[str, int]

    @property
    def flops_by_type(self) -> dict[str, float]:
        """Operations of matrix products by the operands' type."""
        total: dict[str, float] = Counter()
        for kernel in self.kernels:
            for dtype, flops in kernel.flops.items():
                total[dtype] += kernel.times * flops
        return total

    @property
    def flops(self) -> float:
        """Operations of all matrix products, attention kernels included."""
        return float(sum(self.flops_by_type.values()))

    @property
    def num_bytes(self) -> float:
        """Moved between the chip and its memory, caches taken as empty at each kernel's start."""
        return sum((kernel.times * kernel.num_bytes for kernel in self.kernels), 0.0)


def count(text: str) -> Counts:
    """Counts a program.

    Args:
      text: of its optimised HLO.
    Raises:
      ValueError: it is no HLO module.
    """
    module = parse(text)
    counter = _Counter(module)
    for computation, instruction, times in executed(module):
        counter.add(computation, instruction, times)
    return Counts(tuple(counter.kernels), tuple(counter.collectives), dict(counter.uncounted))


# ------------------------------------------------------------------------------ what runs
def executed(module: Module) -> Iterator[tuple[Computation, Instruction, int]]:
    """Each instruction that does something, as a whole (a fusion is one), and how often it runs."""

    def visit(computation: Computation, times: int):
        for instruction in computation:
            called = instruction.called
            if instruction.opcode == "while":
                trips = trip_count(module, instruction)
                yield from visit(module.computations[called["body"][0]], times * trips)
            elif instruction.opcode == "conditional":
                names = [name for names in called.values() for name in names]
                yield from visit(max(map(module.computations.get, names), key=weight), times)
            elif instruction.opcode in ("call", "async-start"):
                for name in called.get("to_apply", called.get("calls", [])):
                    yield from visit(module.computations[name], times)
            elif instruction.opcode not in _FREE:
                yield computation, instruction, times

    @functools.cache
    def weight(computation: Computation) -> float:
        inside = visit(computation, 1)
        return sum((times * traffic(module, parent, i) for parent, i, times in inside), 0.0)

    yield from visit(module.entry, 1)


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a loop's body runs: as the compiler knows it, or read from its condition.

    1 where neither says, as for a search that ends when it has found.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called["condition"][0]]
    if condition.root.opcode == "compare" and condition.root.attribute("direction") == "LT":
        bound = condition.instructions[condition.root.operands[1]]
        if bound.opcode == "constant" and bound.arguments.isdigit():
            return int(bound.arguments)
    return 1


# ------------------------------------------------------------------------------ memory
def traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads and writes.

    Of an operand that it only slices, the slices count; of a buffer updated in place, the update.
    """
    opcode = instruction.opcode
    if opcode in _SLICES:
        source = computation.operand_shapes(instruction)[0]
        read = 0.0 if source[0].on_chip else instruction.num_bytes
        return read + _bytes(instruction.shapes)
    if opcode in ("copy-start", "slice-start"):  # (source, destination, state)
        source, destination = instruction.shapes[:2]
        return destination.num_bytes * ((not source.on_chip) + (not destination.on_chip))
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _bytes(computation.operand_shapes(instruction)[-1 if opcode == "scatter" else 1])
    operands = computation.operand_shapes(instruction)
    if opcode == "fusion" and "calls" in instruction.called:
        body = module.computations[instruction.called["calls"][0]]
        read = sum(
            _read(body, parameter, shapes)
            for parameter, shapes in zip(body.parameters, operands, strict=True)
        )
        return read + _written(body, body.root)
    if opcode.endswith("-start"):  # its result repeats its operands
        return 2 * sum(map(_bytes, operands), 0.0)
    written = _bytes(instruction.shapes)
    if opcode == "custom-call":  # libraries' scratch space comes last, as plain bytes
        last = instruction.shapes[-1] if len(instruction.shapes) > 1 else None
        if last is not None and last.dtype in ("s8", "u8") and len(last.dims) == 1:
            written -= last.num_bytes
    return sum(map(_bytes, operands), 0.0) + written


def _bytes(shapes: Iterable[Shape]) -> float:
    """What of them lies in the chip's main memory."""
    return sum((shape.num_bytes for shape in shapes if not shape.on_chip), 0.0)


def _read(body: Computation, parameter: Instruction, shapes: tuple[Shape, ...]) -> float:
    """What of a fusion's operand is read."""
    whole, sliced = _bytes(shapes), 0.0
    pending, seen = [parameter], set()
    while pending:
        source = pending.pop()
        for user in body.users[source.name]:
            if user.name in seen:
                continue
            seen.add(user.name)
            if user.opcode == "bitcast":
                pending.append(user)
            elif user.opcode in _SLICES and user.operands[0] == source.name:
                sliced += user.num_bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
                continue  # in place
            else:
                return whole
    return min(whole, sliced)


def _written(body: Computation, root: Instruction) -> float:
    """What a fusion writes: of a buffer updated in place, the update."""
    if root.opcode == "tuple":
        return sum((_written(body, body.instructions[name]) for name in root.operands), 0.0)
    if root.opcode == "bitcast":
        return _written(body, body.instructions[root.operands[0]])
    if root.opcode == "dynamic-update-slice":
        return _bytes(body.operand_shapes(root)[1])
    return _bytes(root.shapes)


# ------------------------------------------------------------------------------ counting
class _Counter:
    def __init__(self, module: Module):
        self.module = module
        self.kernels: list[Kernel] = []
        self.collectives: list[Collective] = []
        self.uncounted: Counter[str] = Counter()

    def add(self, computation: Computation, instruction: Instruction, times: int) -> None:
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            self.collectives.append(collective(self.module, kind, computation, instruction, times))
            return
        flops: Counter[str] = Counter()
        for parent, part in self._parts(computation, instruction):
            found = product_flops(parent, part)
            if found is None:
                target = part.attribute("custom_call_target") or part.name
                self.uncounted[target.strip('"')] += times
            elif found[1]:
                flops[found[0]] += found[1]
        self.kernels.append(
            Kernel(
                instruction.name,
                instruction.opcode,
                instruction.op_name,
                times,
                dict(flops),
                traffic(self.module, computation, instruction),
            )
        )

    def _parts(self, computation: Computation, instruction: Instruction):
        """The instruction, or all instructions inside it if it is a fusion."""
        if instruction.opcode != "fusion" or "calls" not in instruction.called:
            yield computation, instruction
            return
        body = self.module.computations[instruction.called["calls"][0]]
        for part in body:
            yield from self._parts(body, part)
