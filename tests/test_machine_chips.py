"""Device names as JAX reports them, and the peak each is measured against."""

import pytest

from microdit_jax.machine.chips import chip_of


@pytest.mark.parametrize(
    "device_kind, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peak_of_known_devices(device_kind, tflops):
    assert chip_of(device_kind).bfloat16_flops == tflops * 1e12


@pytest.mark.parametrize("device_kind", ["NVIDIA H100 80GB HBM3", "TPU v4", "TPU v5 lite",
                                         "TPU v5p", "TPU v6 lite"])  # fmt: skip
def test_all_is_known_of_what_aot_compiles_for(device_kind):
    """Without it, aot says that nothing fits, and its reports cannot be drawn."""
    chip = chip_of(device_kind)
    assert min(chip.memory_bytes, chip.memory_bandwidth, chip.link_bandwidth) > 0
    # Of these nobody has looked up the network between slices: several get a report without times.
    assert chip.network_bandwidth > 0 or device_kind in ("TPU v4", "TPU v5p")


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_nothing_is_claimed_for_others(device_kind):
    assert chip_of(device_kind) is None
