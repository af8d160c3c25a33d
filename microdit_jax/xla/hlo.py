"""What a compiled program does, counted from its optimised HLO.

  counts = hlo.count(compiled.as_text())
  counts.flops, counts.collectives, counts.kernels

Loops count as often as they run, and of a conditional's branches the one that moves most bytes.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from microdit_jax.xla.hlo_text import Computation, Instruction, Module, Shape, parse
from microdit_jax.xla.products import product_flops

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Neither computes nor moves anything.
_FREE = {
    "slice-done",
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
    "opt-barrier", "partition-id", "replica-id", "iota", "copy-done", "async-done", "async-update",
    *(f"{kind}-done" for kind in COLLECTIVES), "send-done", "recv-done", "add-dependency",
}  # fmt: skip
# Read only as much of an operand as they return.
_SLICES = ("slice", "dynamic-slice", "gather")
# Between a weight and its exchange stand only these.
_PASSES_ON = {
    "convert", "bitcast", "copy", "reshape", "transpose", "get-tuple-element", "fusion", "slice",
    "opt-barrier", "bitcast-convert", "copy-start", "copy-done", "broadcast", "pad", "concatenate",
}  # fmt: skip


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
class Collective:
    """An exchange between devices.

    Attributes:
      times: how often it runs.
      num_bytes: that one device must receive from others, each time.
      devices: that take part in the first of its groups.
      bytes_by_type: num_bytes by element type.
      carries: the parameters or activations in it.
    """

    kind: str
    times: int
    num_bytes: float
    devices: tuple[int, ...]
    bytes_by_type: dict[str, float]
    carries: tuple[str, ...]


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

    def exchanged(self, *kinds: str) -> float:
        """Bytes that one device must receive, of these kinds or all."""
        wanted = kinds or COLLECTIVES
        return sum((c.times * c.num_bytes for c in self.collectives if c.kind in wanted), 0.0)


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
            self.collectives.append(self._collective(kind, computation, instruction, times))
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

    def _collective(self, kind, computation, instruction, times) -> Collective:
        devices = first_group(instruction)
        group = len(devices)
        share = {
            "all-gather": group - 1,
            "all-reduce": 2 * (group - 1) / group,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(kind, (group - 1) / group)
        by_type: Counter[str] = Counter()
        for shapes in computation.operand_shapes(instruction):
            for shape in shapes:
                by_type[shape.dtype] += shape.num_bytes * share
        carried = [self._origin(computation, name) for name in instruction.operands]
        if kind == "all-to-all" or set(carried) <= {""}:  # tokens, or nobody knows
            carried = [place(instruction.op_name)]
        return Collective(
            kind,
            times,
            sum(by_type.values()),
            devices,
            dict(by_type),
            tuple(dict.fromkeys(filter(None, carried))),
        )

    def _origin(self, computation: Computation, name: str) -> str:
        """Where what travels comes from: a parameter's name, or the place that computed it."""
        while True:
            instruction = computation.instructions[name]
            if instruction.opcode == "parameter" and computation is self.module.entry:
                return parameter_name(instruction.op_name)
            if instruction.opcode not in _PASSES_ON or not instruction.operands:
                return place(instruction.op_name)
            largest = max(instruction.operands, key=lambda n: computation.instructions[n].num_bytes)
            source = computation.instructions[largest]
            if instruction.opcode == "fusion" and source.num_bytes < instruction.num_bytes / 4:
                return place(instruction.op_name)
            name = largest


def first_group(instruction: Instruction) -> tuple[int, ...]:
    """The first group of devices that exchange.

    Written as {{0,1},{2,3}}; as [2,2]<=[4], maybe transposed; or by the axes of a mesh.
    """
    text = instruction.attributes
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'(\w+)'", mesh[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        kept = [list(sizes).index(axis) for axis in axes]
        rest = [i for i in range(len(sizes)) if i not in kept]
        return tuple(
            ids.transpose(rest + kept).reshape(-1, math.prod(sizes[a] for a in axes))[0].tolist()
        )
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return _numbers(listed[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes, dims = _numbers(iota[1]), _numbers(iota[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose(_numbers(iota[3]))
        return tuple(int(i) for i in ids.reshape(sizes)[0])
    pairs = re.search(r"source_target_pairs=\{\{([\d,]+)\}", text)
    return _numbers(pairs[1]) if pairs else (0, 1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def parameter_name(op_name: str) -> str:
    """params/blocks_0/attn/kernel, a parameter's path, of `state.params['blocks_0'][...]`."""
    return re.sub(r"[\[\]'\".\\]+", "/", op_name).strip("/").removeprefix("state/")


def place(op_name: str) -> str:
    """The part of a name stack that names modules, and the pass: "blocks_1/mlp (backward)"."""
    if not op_name:
        return ""
    backward = "transpose(" in op_name
    again = "rematted_computation" in op_name or "checkpoint" in op_name
    parts = [
        part
        for part in op_name.split("/")
        if not re.match(r"(jit|jvp|transpose|vmap|pjit|shard_map|while|body|closed_call|DiT|cond|"
                        r"branch_\d+_fun|checkpoint|rematted_computation|remat\d?)\b", part)
    ]  # fmt: skip
    if len(parts) > 1:
        parts = parts[:-1]  # the last one is the primitive
    words = ["/".join(parts)]
    if again and backward:
        words.append("(recomputed or backward)")
    elif backward:
        words.append("(backward)")
    return " ".join(words)
