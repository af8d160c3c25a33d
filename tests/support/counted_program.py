"""A counted program on two nodes of H100 whose times come out round."""

from microdit_jax.machine.chips import chip_of
from microdit_jax.xla.hlo.collectives import Collective
from microdit_jax.xla.hlo.count import Counts, Kernel
from microdit_jax.xla.topologies import Topology
from support.stand_in_devices import gpus

CHIP = chip_of("NVIDIA H100 80GB HBM3")
H100 = Topology("h100:2x8", "cuda", tuple(gpus(2, 8)), CHIP)
SLICES = (0,) * 8 + (1,) * 8
COUNTS = Counts(
    kernels=(
        Kernel("matmul", "dot", "", 2, {"bf16": 989e9}, 335e6),  # 1 ms of matmul, 0.1 of memory
        Kernel("sum", "fusion", "", 3, {}, 3.35e9),  # 1 ms of memory
    ),
    collectives=(
        Collective("all-gather", 2, 450e6, tuple(range(8)), {}, ()),  # 1 ms within a host
        Collective("all-reduce", 3, 50e6, (0, 8), {}, ()),  # 1 ms between hosts
    ),
    uncounted={},
)
