"""Collectives in optimised HLO: between which devices, how many bytes, and what they carry."""

import dataclasses
import math
import re
from collections import defaultdict

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
# Passed when a collective's operand is followed back to the parameter it comes from.
_PASSES_ON = {
    "convert", "bitcast", "copy", "reshape", "transpose", "get-tuple-element", "fusion", "slice",
    "opt-barrier", "bitcast-convert", "copy-start", "copy-done", "broadcast", "pad", "concatenate",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """Costs of one collective.

    Attributes:
      times: number of runs.
      num_bytes: bytes that one device must receive from others in one run.
      devices: members of the first of its groups.
      bytes_by_type: num_bytes by element type.
      carries: names of the parameters in it, or of the modules that computed its operands.
      started, finished: number of kernels scheduled before its start, and before its result is
        waited for. Equal for one that the program waits for at once.
      order: number of its start and of its end among those of all collectives.
    """

    kind: str
    times: int
    num_bytes: float
    devices: tuple[int, ...]
    bytes_by_type: dict[str, float]
    carries: tuple[str, ...]
    started: int = 0
    finished: int = 0
    order: tuple[int, int] = (0, 0)


def collective(
    module: Module, kind: str, computation: Computation, instruction: Instruction, times: int
) -> Collective:
    """Counts an instruction, whose kind is one of COLLECTIVES."""
    if instruction.opcode == "send":
        devices = first_group_across(instruction, module.devices)
    else:
        devices = first_group(instruction, module.devices)
    group = len(devices)
    share = {
        "all-gather": group - 1,
        "all-reduce": 2 * (group - 1) / group,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }.get(kind, (group - 1) / group)
    by_type: defaultdict[str, float] = defaultdict(float)
    for shapes in computation.operand_shapes(instruction):
        for shape in (shape for shape in shapes if shape.num_bytes):
            by_type[shape.dtype] += shape.num_bytes * share
    carried = [_origin(module, computation, name) for name in instruction.operands]
    if kind == "all-to-all" or set(carried) <= {""}:  # all-to-alls carry tokens, no parameter
        carried = [module_path(instruction.op_name)]
    return Collective(
        kind,
        times,
        sum(by_type.values()),
        devices,
        dict(by_type),
        tuple(dict.fromkeys(filter(None, carried))),
    )


def kind_across(instruction: Instruction) -> str:
    """Returns the kind of a collective that libtpu writes as a host's sends and receives, or "".

    What runs between the slices of a TPU program is no collective in its text: each device hands
    its part to the host's runtime ("megascale") by a `send`, and gets the result by a `recv`.
    """
    if instruction.opcode not in ("send", "recv"):
        return ""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if found is None:  # a callback's
        return ""
    kind = found[1].lower().replace("_", "-")
    kind = "collective-permute" if kind == "one-to-one" else kind
    if kind not in COLLECTIVES:
        raise ValueError(
            f"expected a known kind of transfer between slices at {instruction.name}, found "
            f"{found[1]}"
        )
    return kind


def awaits_across(computation: Computation, send: Instruction) -> Instruction | None:
    """Finds the instruction that waits for the result of a `send` between slices."""
    named = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
    rendezvous = named.search(send.attributes)
    for instruction in computation:
        if instruction.opcode == "recv" and rendezvous is not None:
            other = named.search(instruction.attributes)
            if other is not None and other[1] == rendezvous[1]:
                waits = [u for u in computation.users[instruction.name] if u.opcode == "recv-done"]
                return waits[0] if waits else None
    return None


def first_group_across(send: Instruction, devices: int) -> tuple[int, ...]:
    """Parses the first group of a transfer between slices: a device of each slice in it.

    Groups are written as "{1,2}x{0:3}", devices 0 to 3 of slices 1 and 2; or each device by its
    slice times 100,000 and its number there, as {{100000,200000},...} or {{100000->200000},...}.

    Args:
      devices: number of devices of each slice: such a program's text is that of one slice.
    Raises:
      ValueError: the groups are written in a way that is not known here.
    """
    text, group = send.attributes, list[tuple[int, int]]()
    if short := re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):\d+\}"', text):
        group = [(number, int(short[2])) for number in _numbers(short[1])]
    elif listed := re.search(r'_xla_megascale_target="?\{\{(\d+(?:(?:,|->)\d+)+)\}', text):
        group = [divmod(int(n), 100_000) for n in re.findall(r"\d+", listed[1])]
    if group and min(group)[0] >= 1:
        return tuple((number - 1) * devices + device for number, device in group)
    target = re.search(r"_xla_megascale_target=.{0,80}", text)
    raise ValueError(
        f"expected slices in a known form at {send.name}, found {target[0] if target else 'none'}"
    )


def _origin(module: Module, computation: Computation, name: str) -> str:
    """Follows an operand back to a parameter's name, or to the module that computed it."""
    while True:
        instruction = computation.instructions[name]
        if instruction.opcode == "parameter" and computation is module.entry:
            return parameter_name(instruction.op_name)
        if instruction.opcode not in _PASSES_ON or not instruction.operands:
            return module_path(instruction.op_name)
        largest = max(instruction.operands, key=lambda n: computation.instructions[n].num_bytes)
        source = computation.instructions[largest]
        if instruction.opcode == "fusion" and source.num_bytes < instruction.num_bytes / 4:
            return module_path(instruction.op_name)
        name = largest


def first_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """Parses the first group of devices that communicate.

    Groups are written as {{0,1},{2,3}}; as {}, all devices; as [2,2]<=[4], possibly with a
    transpose; or by the axes of a mesh. A permutation's first pair of source and target is its
    group.

    Args:
      devices: number of devices that run the program.
    Raises:
      ValueError: the groups are written in a way that is not known here.
    """
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{\{(\d+,\d+)\}", text):
        return _numbers(pairs[1])
    if re.search(r"replica_groups=\{\}", text):
        return tuple(range(devices))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return _numbers(listed[1])
    if iota := re.search(
        r"replica_groups=\[(\d+,\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?(?=[,\s]|$)", text
    ):
        dims = _numbers(iota[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose(_numbers(iota[3]))
        return tuple(int(i) for i in ids.reshape(_numbers(iota[1]))[0])
    if mesh := re.search(r"replica_groups=mesh\[((?:'\w+'=\d+(?:, ?)?)+)\] ?\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'(\w+)'", mesh[2])
        if not re.sub(r"'\w+'|[,\s]", "", mesh[2]) and set(axes) <= sizes.keys():
            ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
            kept = [list(sizes).index(axis) for axis in axes]
            rest = [i for i in range(len(sizes)) if i not in kept]
            groups = ids.transpose(rest + kept).reshape(-1, math.prod(sizes[a] for a in axes))
            return tuple(groups[0].tolist())
    groups = re.search(r"(?:replica_groups|source_target_pairs)=.{0,80}", text)
    raise ValueError(
        f"expected groups of devices in a known form at {instruction.name}, found "
        f"{groups[0] if groups else 'none'}"
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def parameter_name(op_name: str) -> str:
    """Turns `state.params['blocks_0']['w1']` into the parameter's path params/blocks_0/w1."""
    return re.sub(r"[\[\]'\".\\]+", "/", op_name).strip("/").removeprefix("state/")


def module_path(op_name: str) -> str:
    """Extracts the Flax module and the pass from a name stack: "blocks_1/mlp (backward)"."""
    if not op_name:
        return ""
    backward = "transpose(" in op_name
    recomputed = "rematted_computation" in op_name or "checkpoint" in op_name
    parts = [
        part
        for part in op_name.split("/")
        if not re.match(r"(jit|jvp|transpose|vmap|pjit|shard_map|while|body|closed_call|DiT|cond|"
                        r"branch_\d+_fun|checkpoint|rematted_computation|remat\d?)\b", part)
    ]  # fmt: skip
    if len(parts) > 1:
        parts = parts[:-1]  # the last one is the primitive
    words = ["/".join(parts)]
    if recomputed and backward:
        words.append("(recomputed or backward)")
    elif backward:
        words.append("(backward)")
    return " ".join(words)
