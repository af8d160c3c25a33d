"""Counts the operations of matmuls, in every form that the backends give them.

CPUs keep `dot`; GPUs call cuBLAS and cuDNN; TPUs turn matmuls into convolutions. Of Pallas kernels,
those of splash attention are known. A multiply-add counts as two operations.
"""

import math
import re
from collections.abc import Sequence

from microdit_jax.xla.hlo.text import Computation, Instruction, Shape

# Matmuls of one pass of an attention kernel. Forward: the scores and the weighted sum of values;
# backward: four gradients, and the scores again.
CUDNN_MATMULS = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
# Forward: scores, weighted sum. dq: scores, d(probabilities), dq. dkv: the first two, dk and dv.
SPLASH_MATMULS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}

# Custom calls without any matmul.
_NO_MATMUL = re.compile(
    r"topk|sort|rng|memset|annotate|Sharding|SPMD|AllocateBuffer|MoveToHost|MoveToDevice|"
    r"PartialReduce|InspectSparse|LayoutConstraint|Eigen|erf|ConcatBitcast|GatherScatterIndices|"
    r"PrepareAsyncCall|AssumeGatherIndices|ZeroCrop",
    re.IGNORECASE,
)


def matmul_flops(computation: Computation, instruction: Instruction) -> tuple[str, float] | None:
    """Counts the matmul operations of one instruction.

    Returns:
      Element type of the operands and the number of operations, 0 for anything but a matmul; None
      for a custom call that is unknown here.
    """
    if instruction.opcode == "dot":
        lhs = computation.instructions[instruction.operands[0]].shapes[0]
        contracted = _numbers(instruction.attribute("lhs_contracting_dims"))
        return lhs.dtype, _dot(instruction.shapes[0].elements, lhs.dims, contracted)
    if instruction.opcode == "convolution":
        lhs, rhs = (computation.instructions[name].shapes[0] for name in instruction.operands)
        return lhs.dtype, _convolution(instruction, lhs.dims, rhs.dims)
    if instruction.opcode == "custom-call":
        return _custom_call(computation, instruction)
    return "", 0.0


def _numbers(braces: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", braces or "")]


def _dot(outputs: int, lhs_dims: tuple[int, ...], contracted: list[int]) -> float:
    return 2.0 * outputs * math.prod(lhs_dims[i] for i in contracted)


# ------------------------------------------------------------------------------ TPU
def _convolution(
    instruction: Instruction, lhs_dims: tuple[int, ...], rhs_dims: tuple[int, ...]
) -> float:
    """Counts only window positions on elements of the input, as XLA's own cost analysis does.

    A batched matmul arrives as a window as long as the batch, nearly all of it padding.
    """
    labels = instruction.attribute("dim_labels") or ""  # b01f_01io->b01f
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", labels)
    window = _window(instruction.attributes)
    spatial = [label for label in rhs_labels if label.isdigit()]
    positions = 1
    for i, label in enumerate(spatial):
        positions *= _valid_positions(
            lhs_dims[lhs_labels.index(label)],
            rhs_dims[rhs_labels.index(label)],
            instruction.shapes[0].dims[out_labels.index(label)],
            {name: values[i] for name, values in window.items()},
        )
    batch, features_in = lhs_dims[lhs_labels.index("b")], lhs_dims[lhs_labels.index("f")]
    features_out = instruction.shapes[0].dims[out_labels.index("f")]
    groups = int(instruction.attribute("feature_group_count") or 1)
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * positions * (batch / batch_groups) * (features_in / groups) * features_out


def _window(attributes: str) -> dict[str, list]:
    """Parses {"stride": [...], "pad": [(low, high), ...], ...}, a value per spatial dimension."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    entries = dict(part.split("=", 1) for part in match[1].split()) if match else {}
    found: dict[str, list] = {}
    for name, text in entries.items():
        values = text.split("x")
        found[name] = [tuple(map(int, v.split("_"))) if name == "pad" else int(v) for v in values]
    return found


def _valid_positions(inputs: int, kernel: int, outputs: int, window: dict) -> int:
    """Counts the pairs of output and kernel positions that meet an element of the input."""
    low = window.get("pad", (0, 0))[0]
    stride, lhs_dilate = window.get("stride", 1), window.get("lhs_dilate", 1)
    rhs_dilate = window.get("rhs_dilate", 1)
    span, total = (inputs - 1) * lhs_dilate, 0
    for k in range(kernel):
        # Output positions o with 0 <= o stride + k rhs_dilate - low <= span
        offset = k * rhs_dilate - low
        first = max(0, math.ceil(-offset / stride))
        last = min(outputs - 1, (span - offset) // stride)
        if lhs_dilate == 1:
            total += max(0, last - first + 1)
        else:
            # lhs dilation puts zeros between the elements of the input
            total += sum((o * stride + offset) % lhs_dilate == 0 for o in range(first, last + 1))
    return total


# ------------------------------------------------------------------------------ kernels
def _custom_call(computation: Computation, instruction: Instruction) -> tuple[str, float] | None:
    target = (instruction.attribute("custom_call_target") or "").strip('"')
    operands = computation.operand_shapes(instruction)
    if target.startswith("__cublas$"):
        lhs = operands[0][0]
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        contracted = _numbers(found[1] if found else None)
        return lhs.dtype, _dot(instruction.shapes[0].elements, lhs.dims, contracted)
    if target in CUDNN_MATMULS:
        q, k = operands[0][0], operands[1][0]  # (n, t, h, c), (n, l, h, c)
        return q.dtype, CUDNN_MATMULS[target] * 2.0 * math.prod(q.dims) * k.dims[1]
    if target == "tpu_custom_call":
        return _pallas(instruction, operands)
    if target in ("__onednn$matmul", "__triton_kernel_call") or not _NO_MATMUL.search(target):
        return None
    return "", 0.0


def _pallas(
    instruction: Instruction, operands: Sequence[tuple[Shape, ...]]
) -> tuple[str, float] | None:
    """Counts splash attention, known by its kernels' names: q (n, h, t, c), k (n, h, l, c)."""
    for name, matmuls in SPLASH_MATMULS.items():
        if name in instruction.op_name or name in instruction.name:
            q, k = [shapes[0] for shapes in operands if len(shapes[0].dims) == 4][:2]
            return q.dtype, matmuls * 2.0 * math.prod(q.dims) * k.dims[-2]
    return None
