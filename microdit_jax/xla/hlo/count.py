"""Counts kernels and collectives of a compiled program from its optimised HLO.

  counts = count(compiled.as_text())
  counts.flops, counts.kernels, counts.collectives

The body of a loop counts as often as it runs. Of a conditional's branches, the one that moves the
most bytes counts.
"""

import dataclasses
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from microdit_jax.xla.hlo.collectives import (
    COLLECTIVES,
    Collective,
    awaits_across,
    collective,
    kind_across,
)
from microdit_jax.xla.hlo.matmuls import matmul_flops
from microdit_jax.xla.hlo.text import Computation, Instruction, Module, parse
from microdit_jax.xla.hlo.traffic import traffic

# Wait for what was started, and neither compute nor move anything themselves.
_DONE = {
    "slice-done", "copy-done", "async-done", "send-done", "recv-done",
    *(f"{kind}-done" for kind in COLLECTIVES),
}  # fmt: skip
_FREE = _DONE | {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
    "opt-barrier", "partition-id", "replica-id", "iota", "async-update", "add-dependency",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Costs of one instruction.

    Attributes:
      times: number of runs.
      flops: matmul operations of one run, by the operands' element type.
      num_bytes: bytes that one run reads from and writes to memory.
    """

    name: str
    opcode: str
    op_name: str
    times: int
    flops: dict[str, float]
    num_bytes: float


@dataclasses.dataclass(frozen=True)
class Counts:
    """Kernels and collectives of a program on one device, in the order they are scheduled.

    Attributes:
      uncounted: runs of custom calls whose operations are unknown, by name.
    """

    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    uncounted: dict[str, int]

    @property
    def flops_by_type(self) -> dict[str, float]:
        """Matmul operations by the operands' element type."""
        total: defaultdict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            for dtype, flops in kernel.flops.items():
                total[dtype] += kernel.times * flops
        return dict(total)

    @property
    def flops(self) -> float:
        """Operations of all matmuls, those of attention kernels included."""
        return float(sum(self.flops_by_type.values()))

    @property
    def num_bytes(self) -> float:
        """Bytes that all kernels move between the chip and its memory."""
        return sum((kernel.times * kernel.num_bytes for kernel in self.kernels), 0.0)


def count(text: str) -> Counts:
    """Counts a program.

    Args:
      text: its optimised HLO.
    Raises:
      ValueError: the text is no HLO module.
    """
    module = parse(text)
    counter = _Counter(module)
    for step in executed(module):
        counter.add(step)
    return Counts(tuple(counter.kernels), tuple(counter.collectives), dict(counter.uncounted))


# ------------------------------------------------------------------------------ what runs
_Key = tuple[str, str]  # names of a computation and of one of its instructions


class Step(NamedTuple):
    """An instruction that runs `times` times; `done` is the one that waits for it, if any does."""

    computation: Computation
    instruction: Instruction
    times: int
    done: _Key | None = None


def executed(module: Module) -> Iterator[Step]:
    """Yields the instructions that do or await something, in order; a fusion is one instruction."""

    def visit(computation: Computation, times: int, done: _Key | None = None) -> Iterator[Step]:
        for instruction in computation:
            opcode, called = instruction.opcode, instruction.called
            if opcode == "while":
                body = module.computations[called["body"][0]]
                yield from visit(body, times * trip_count(module, instruction))
            elif opcode == "conditional":
                branches = [
                    module.computations[name] for names in called.values() for name in names
                ]
                yield from visit(max(branches, key=weight), times)
            elif opcode in ("call", "async-start"):
                awaited = _awaited_by(computation, instruction) if opcode != "call" else done
                for name in called.get("to_apply", called.get("calls", [])):
                    yield from visit(module.computations[name], times, awaited)
            elif opcode in _DONE or opcode not in _FREE:
                awaited = _awaited_by(computation, instruction) or done
                yield Step(computation, instruction, times, awaited)

    @functools.cache
    def weight(computation: Computation) -> float:
        return sum(
            (
                step.times * traffic(module, step.computation, step.instruction)
                for step in visit(computation, 1)
                if step.instruction.opcode not in _DONE
            ),
            0.0,
        )

    yield from visit(module.entry, 1)


def _awaited_by(computation: Computation, instruction: Instruction) -> _Key | None:
    """Finds the instruction that waits for one that only starts something."""
    if instruction.opcode.endswith("-start") or instruction.opcode == "async-update":
        for user in computation.users[instruction.name]:
            if user.opcode in _DONE:
                return computation.name, user.name
            if user.opcode == "async-update":
                return _awaited_by(computation, user)
    return None


def trip_count(module: Module, loop: Instruction) -> int:
    """Returns how often a loop's body runs, by the compiler's note or the loop's condition.

    It is 1 where neither says, as for a search that ends when it has found something.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called["condition"][0]]
    if condition.root.opcode == "compare" and condition.root.attribute("direction") == "LT":
        limit = condition.instructions[condition.root.operands[1]]
        if limit.opcode == "constant" and limit.arguments.isdigit():
            return int(limit.arguments)
    return 1


# ------------------------------------------------------------------------------ counting
class _Counter:
    def __init__(self, module: Module):
        self.module = module
        self.kernels: list[Kernel] = []
        self.collectives: list[Collective] = []
        self.uncounted: Counter[str] = Counter()
        self._started: dict[_Key, list[int]] = {}  # indices of the collectives not awaited yet
        self._events = 0  # starts and ends of collectives until now

    def add(self, step: Step) -> None:
        computation, instruction, times, done = step
        if instruction.opcode in _DONE:
            self._finish((computation.name, instruction.name))
            return
        kind = kind_across(instruction) or instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            if instruction.opcode == "recv":
                return  # counted with its send
            if instruction.opcode == "send":
                waits = awaits_across(computation, instruction)
                done = (computation.name, waits.name) if waits is not None else None
            if done:
                self._started.setdefault(done, []).append(len(self.collectives))
            found = collective(self.module, kind, computation, instruction, times)
            now, number = len(self.kernels), self._events
            self._events += 1
            self.collectives.append(
                dataclasses.replace(found, started=now, finished=now, order=(number, number))
            )
            return
        flops: defaultdict[str, float] = defaultdict(float)
        for parent, part in self._parts(computation, instruction):
            matmul = matmul_flops(parent, part)
            if matmul is None:
                target = part.attribute("custom_call_target") or part.name
                self.uncounted[target.strip('"')] += times
            elif matmul[1]:
                flops[matmul[0]] += matmul[1]
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

    def _finish(self, done: _Key) -> None:
        for i in self._started.pop(done, []):
            found = self.collectives[i]
            order = (found.order[0], self._events)
            self._events += 1
            self.collectives[i] = dataclasses.replace(
                found, finished=len(self.kernels), order=order
            )

    def _parts(
        self, computation: Computation, instruction: Instruction
    ) -> Iterator[tuple[Computation, Instruction]]:
        """Yields the instruction or, if it is a fusion, all instructions inside it."""
        if instruction.opcode != "fusion" or "calls" not in instruction.called:
            yield computation, instruction
            return
        body = self.module.computations[instruction.called["calls"][0]]
        for part in body:
            yield from self._parts(body, part)
