"""Peak rates, bandwidths and prices of accelerators, with the source of each figure."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator, one device to JAX.

    Attributes:
      device_kinds: prefixes of `jax.Device.device_kind`.
      bfloat16_flops: operations per second of dense bfloat16 matmuls with float32 accumulation.
      source: where the figures are published. NVIDIA prints twice as many operations, for matrices
        with structured sparsity; these are the dense figures.
      memory_bytes: size of the chip's own memory; 0 if not looked up.
      memory_bandwidth: bytes per second to the chip's own memory; 0 if not looked up.
      link_bandwidth: bytes per second received from neighbours over all links together, half of the
        figure that is printed for both directions; 0 if not looked up.
      network_bandwidth: bytes per second received from chips of another slice; on GPUs a slice is
        a host, on TPUs all chips that the links join. 0 if not looked up.
      dollars_per_hour: price of one chip without commitment; None if there is none to quote.
      price_source: whose price it is, and when.
    """

    name: str
    device_kinds: tuple[str, ...]
    bfloat16_flops: float
    source: str
    memory_bytes: float = 0.0
    memory_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    network_bandwidth: float = 0.0
    dollars_per_hour: float | None = None
    price_source: str = ""


_H100 = "NVIDIA H100 datasheet, BFLOAT16 Tensor Core, half of the figure with sparsity"
_H200 = "NVIDIA H200 datasheet, BFLOAT16 Tensor Core, half of the figure with sparsity"
_TPU = "docs.cloud.google.com/tpu/docs/{}, peak compute, HBM and ICI per chip"
_TPU_PRICE = "cloud.google.com/tpu/pricing, on demand in US regions; look it up, it changes"

# A prefix of another name comes after it: "TPU v5" after "TPU v5 lite". On TPU v4 and v5p one JAX
# device is one chip.
CHIPS = (
    Chip("H100 PCIe", ("NVIDIA H100 PCIe",), 756e12, _H100),
    Chip("H100 NVL", ("NVIDIA H100 NVL",), 835e12, _H100),
    Chip(
        "H100 SXM",
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        989e12,
        _H100 + "; HBM3 and NVLink there; hosts joined by one 400 Gb/s adapter for each GPU",
        memory_bytes=84_929_347_584.0,  # as a device reports it
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        dollars_per_hour=3.79,
        price_source="arXiv 2407.15811: USD 1,890 for 2.6 days on 8",
    ),
    Chip("H200 NVL", ("NVIDIA H200 NVL",), 835e12, _H200),
    Chip(
        "H200 SXM",
        ("NVIDIA H200",),
        989e12,
        _H200 + "; HBM3e and NVLink there",
        memory_bandwidth=4.8e12,
        link_bandwidth=450e9,
    ),
    Chip("A100", ("NVIDIA A100",), 312e12, "NVIDIA A100 datasheet, BFLOAT16 Tensor Core"),
    Chip(
        "TPU v4",
        ("TPU v4",),
        275e12,
        _TPU.format("v4") + "; links: arXiv 2304.01433, table 4, six of 50 GB/s",
        memory_bytes=32 * 2.0**30,
        memory_bandwidth=1200e9,
        link_bandwidth=300e9,
    ),
    Chip(
        "TPU v5e",
        ("TPU v5 lite", "TPU v5e"),
        197e12,
        _TPU.format("v5e") + "; network there: 6.4 Tb/s of a pod's 256 chips",
        memory_bytes=16 * 2.0**30,
        memory_bandwidth=819e9,
        link_bandwidth=200e9,
        network_bandwidth=3.125e9,
        dollars_per_hour=1.20,
        price_source=_TPU_PRICE,
    ),
    Chip(
        "TPU v5p",
        ("TPU v5p", "TPU v5"),
        459e12,
        _TPU.format("v5p"),
        memory_bytes=95 * 2.0**30,
        memory_bandwidth=2765e9,
        link_bandwidth=600e9,
        dollars_per_hour=4.20,
        price_source=_TPU_PRICE,
    ),
    Chip(
        "TPU v6e",
        ("TPU v6 lite", "TPU v6e"),
        918e12,
        _TPU.format("v6e") + "; network there: 25.6 Tb/s of a pod's 256 chips",
        memory_bytes=32 * 2.0**30,
        memory_bandwidth=1600e9,
        link_bandwidth=400e9,
        network_bandwidth=12.5e9,
        dollars_per_hour=2.70,
        price_source=_TPU_PRICE,
    ),
)


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a `device_kind`; None for CPUs, parts of a GPU (MIG), and others."""
    for chip in CHIPS:
        if device_kind.startswith(chip.device_kinds) and "MIG" not in device_kind:
            return chip
    return None
