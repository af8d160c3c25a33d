"""Counts the bytes that instructions move between the chip and its memory.

Caches are taken to be empty when an instruction starts.
"""

from collections.abc import Iterable

from microdit_jax.xla.hlo.text import Computation, Instruction, Module, Shape

# Read only as much of an operand as they return.
_SLICES = ("slice", "dynamic-slice", "gather")


def traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Counts the bytes that an instruction reads from and writes to memory.

    An operand that is only sliced counts with its slices, a buffer updated in place with the
    update.
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
    if opcode.endswith("-start"):  # the result's tuple lists the operands again
        return 2 * sum(map(_bytes, operands), 0.0)
    written = _bytes(instruction.shapes)
    if opcode == "custom-call":  # a library's scratch space is the last result, as plain bytes
        last = instruction.shapes[-1] if len(instruction.shapes) > 1 else None
        if last is not None and last.dtype in ("s8", "u8") and len(last.dims) == 1:
            written -= last.num_bytes
    return sum(map(_bytes, operands), 0.0) + written


def _bytes(shapes: Iterable[Shape]) -> float:
    """Size in bytes of the arrays that lie in the chip's main memory."""
    return sum((shape.num_bytes for shape in shapes if not shape.on_chip), 0.0)


def _read(body: Computation, parameter: Instruction, shapes: tuple[Shape, ...]) -> float:
    """Counts the bytes that a fusion reads of one operand."""
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
    """Counts the bytes that a fusion writes; of a buffer updated in place, those of the update."""
    if root.opcode == "tuple":
        return sum((_written(body, body.instructions[name]) for name in root.operands), 0.0)
    if root.opcode == "bitcast":
        return _written(body, body.instructions[root.operands[0]])
    if root.opcode == "dynamic-update-slice":
        return _bytes(body.operand_shapes(root)[1])
    return _bytes(root.shapes)
