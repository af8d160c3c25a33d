"""What accelerators can do at best, to measure ourselves against."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator as JAX sees it: one device.

    Attributes:
      device_kinds: what `jax.Device.device_kind` starts with.
      bfloat16_flops: dense bfloat16 matrix products with float32 sums, operations per second.
      source: where the figure stands. NVIDIA prints twice as much, for matrices with structured
        zeros; here are the dense figures.
    """

    name: str
    device_kinds: tuple[str, ...]
    bfloat16_flops: float
    source: str


_H100 = "NVIDIA H100 datasheet, BFLOAT16 Tensor Core, half of the figure with sparsity"
_H200 = "NVIDIA H200 datasheet, BFLOAT16 Tensor Core, half of the figure with sparsity"
_TPU = "docs.cloud.google.com/tpu/docs/{}, peak compute per chip (bf16)"

# Longer names first: "TPU v5 lite" before "TPU v5". On TPU v4 and v5p one JAX device is one chip.
CHIPS = (
    Chip("H100 PCIe", ("NVIDIA H100 PCIe",), 756e12, _H100),
    Chip("H100 NVL", ("NVIDIA H100 NVL",), 835e12, _H100),
    Chip("H100 SXM", ("NVIDIA H100 80GB HBM3", "NVIDIA H100"), 989e12, _H100),
    Chip("H200 NVL", ("NVIDIA H200 NVL",), 835e12, _H200),
    Chip("H200 SXM", ("NVIDIA H200",), 989e12, _H200),
    Chip("A100", ("NVIDIA A100",), 312e12, "NVIDIA A100 datasheet, BFLOAT16 Tensor Core"),
    Chip("TPU v4", ("TPU v4",), 275e12, _TPU.format("v4")),
    Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 197e12, _TPU.format("v5e")),
    Chip("TPU v5p", ("TPU v5p", "TPU v5"), 459e12, _TPU.format("v5p")),
    Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), 918e12, _TPU.format("v6e")),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `device_kind`; None for any other, CPUs included."""
    for chip in CHIPS:
        if device_kind.startswith(chip.device_kinds) and "MIG" not in device_kind:
            return chip
    return None
