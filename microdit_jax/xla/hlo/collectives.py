"""Exchanges between devices in optimised HLO: who exchanges, how many bytes, and of what."""

import dataclasses
import math
import re
from collections import Counter

import numpy as np

from microdit_jax.xla.hlo.text import Computation, Instruction, Module

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Between a weight and its exchange stand only these.
_PASSES_ON = {
    "convert", "bitcast", "copy", "reshape", "transpose", "get-tuple-element", "fusion", "slice",
    "opt-barrier", "bitcast-convert", "copy-start", "copy-done", "broadcast", "pad", "concatenate",
}  # fmt: skip


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


def collective(
    module: Module, kind: str, computation: Computation, instruction: Instruction, times: int
) -> Collective:
    """What an instruction of one of COLLECTIVES exchanges."""
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
    carried = [_origin(module, computation, name) for name in instruction.operands]
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


def _origin(module: Module, computation: Computation, name: str) -> str:
    """Where what travels comes from: a parameter's name, or the place that computed it."""
    while True:
        instruction = computation.instructions[name]
        if instruction.opcode == "parameter" and computation is module.entry:
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
