"""Operations of matrix products, in every form that the backends give them.

CPUs keep `dot`; GPUs call cuBLAS and cuDNN; TPUs turn products into convolutions; Pallas kernels
are counted where we know them (splash attention). Two operations for each multiply-add.
"""

import math
import re

from microdit_jax.xla.hlo.text import Computation, Instruction

# Products of an attention kernel's pass: scores and sum; backward with the scores once more.
CUDNN_PRODUCTS = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
# Splash attention's kernels: scores and sum; scores, d(probabilities) and dq; those and dk, dv.
SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}

# Kernels from outside XLA that multiply no matrices.
_NO_PRODUCT = re.compile(
    r"topk|sort|rng|memset|annotate|Sharding|SPMD|AllocateBuffer|MoveToHost|MoveToDevice|"
    r"PartialReduce|InspectSparse|LayoutConstraint|Eigen|erf|ConcatBitcast|GatherScatterIndices|"
    r"PrepareAsyncCall|AssumeGatherIndices",
    re.IGNORECASE,
)


def product_flops(computation: Computation, instruction: Instruction) -> tuple[str, float] | None:
    """(type of the operands, operations) of one instruction, 0 for what is no product.

    None for a kernel from outside XLA that is not known here.
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
    """Operations at places that the window's padding and dilation leave: as XLA's cost analysis.

    A batched product arrives as a window as long as the batch, nearly all of it padding.
    """
    lhs_labels, rhs_labels, out_labels = re.split(
        r"_|->", re.search(r"dim_labels=([\w?]+->[\w?]+)", instruction.attributes)[1]
    )
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
    """{"stride": [...], "pad": [(low, high), ...], ...}, each as long as the spatial dimensions."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    entries = dict(part.split("=") for part in match[1].split()) if match else {}
    found = {}
    for name, text in entries.items():
        values = text.split("x")
        found[name] = [tuple(map(int, v.split("_"))) if name == "pad" else int(v) for v in values]
    return found


def _valid_positions(inputs: int, kernel: int, outputs: int, window: dict) -> int:
    """Pairs of output and kernel places that meet an element of the input."""
    low = window.get("pad", (0, 0))[0]
    stride, lhs_dilate = window.get("stride", 1), window.get("lhs_dilate", 1)
    rhs_dilate = window.get("rhs_dilate", 1)
    span, total = (inputs - 1) * lhs_dilate, 0
    for k in range(kernel):
        # Of output places o: 0 <= o stride + k rhs_dilate - low <= span, on an input element
        offset = k * rhs_dilate - low
        first = max(0, math.ceil(-offset / stride))
        last = min(outputs - 1, (span - offset) // stride)
        if lhs_dilate == 1:
            total += max(0, last - first + 1)
        else:
            total += sum((o * stride + offset) % lhs_dilate == 0 for o in range(first, last + 1))
    return total


# ------------------------------------------------------------------------------ kernels
def _custom_call(computation: Computation, instruction: Instruction) -> tuple[str, float] | None:
    target = instruction.attribute("custom_call_target").strip('"')
    operands = computation.operand_shapes(instruction)
    if target.startswith("__cublas$"):
        lhs = operands[0][0]
        contracted = re.search(
            r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes
        )[1]
        return lhs.dtype, _dot(instruction.shapes[0].elements, lhs.dims, _numbers(contracted))
    if target in CUDNN_PRODUCTS:
        q, k = operands[0][0], operands[1][0]  # (n, t, h, c), (n, l, h, c)
        return q.dtype, CUDNN_PRODUCTS[target] * 2.0 * math.prod(q.dims) * k.dims[1]
    if target == "tpu_custom_call":
        return _pallas(instruction, operands)
    if target in ("__onednn$matmul", "__triton_kernel_call") or not _NO_PRODUCT.search(target):
        return None
    return "", 0.0


def _pallas(instruction: Instruction, operands) -> tuple[str, float] | None:
    """Splash attention by its kernels' names; its operands: q (n, h, t, c), k (n, h, l, c)."""
    for name, products in SPLASH_PRODUCTS.items():
        if name in instruction.op_name or name in instruction.name:
            q, k = [shapes[0] for shapes in operands if len(shapes[0].dims) == 4][:2]
            return q.dtype, products * 2.0 * math.prod(q.dims) * k.dims[-2]
    return None
