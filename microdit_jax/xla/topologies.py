"""Devices of machines that are not here, to compile for.

  topologies.prepare("h100:8x8")          # before JAX opens any device
  topology = topologies.get("h100:8x8")   # eight nodes of eight
  mesh = sharding.make_mesh(fsdp=8, devices=topology.devices)

Names are CHIP:SIZES: the nodes and GPUs of each (h100:8 is one node), or the shape of a TPU slice
(v5e:4x4), of which there may be several (2*v5e:4x4).

The compilers of TPUs (the wheel libtpu) and NVIDIA GPUs (jax[cuda12]) run on any CPU host. Programs
can be compiled for such devices, but no array can be put on them.
"""

import dataclasses
import importlib.metadata
import importlib.resources
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies as jax_topologies

from microdit_jax.errors import UserError
from microdit_jax.machine import compile_options, memory
from microdit_jax.machine.chips import Chip, chip_of
from microdit_jax.machine.slices import slice_of

GPUS_PER_NODE = 8
# TPU generation -> dimensions of its slices; the number of chips is their product.
TPU_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
# Wheels that compile, beside jaxlib. cuDNN plans attention kernels, nvcc brings ptxas.
COMPILERS = {
    "cpu": (),
    "tpu": ("libtpu",),
    "cuda": tuple(
        name.format(n)
        for n in (12, 13)
        for name in ("jax-cuda{}-pjrt", "nvidia-cudnn-cu{}", "nvidia-cuda-nvcc-cu{}")
    ),
}
EXPECTED = "h100:8, h100:8x8, v5e:4x4, v5p:2x2x4, v6e:4x4, 2*v5e:4x4 or cpu:8"
INSTALL = "pip install 'microdit_jax[aot]'"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that a program can be compiled for.

    Attributes:
      name: "h100:8x8"; "h100:64" is the same, and named like this here.
      platform: "cuda", "tpu" or "cpu".
      chip: peaks of each device; None for CPUs.
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    chip: Chip | None

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Compiler options: our presets, and what compiling without a device needs."""
        across = len(set(map(slice_of, self.devices))) > 1
        return compile_options.compiler_options(
            self.platform, across_slices=across, without_a_device=True
        )

    @property
    def compiler(self) -> str:
        """Wheels that compile for it with their versions: "jaxlib 0.10.2, libtpu 0.0.52"."""
        wheels = ("jaxlib", *COMPILERS[self.platform])
        return ", ".join(f"{wheel} {found}" for wheel in wheels if (found := _version(wheel)))


class Shape(NamedTuple):
    """Contents of a topology's name: the number of slices of a kind of chip, and their sizes."""

    kind: str
    slices: int
    sizes: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Number of all devices."""
        return self.slices * math.prod(self.sizes)

    @property
    def name(self) -> str:
        """Name in one of its spellings, the same for every spelling."""
        sizes = "x".join(map(str, self.sizes))
        if self.slices == 1:
            return f"{self.kind}:{sizes}"
        return (
            f"{self.kind}:{self.slices}x{sizes}"
            if self.kind == "h100"
            else (f"{self.slices}*{self.kind}:{sizes}")
        )


def parse_name(name: str) -> Shape:
    """Parses "v5e:4x4", "2*v5e:4x4", "h100:8x8", "h100:64".

    Raises:
      UserError: the name is malformed.
    """
    match = re.fullmatch(r"(?:(\d{1,6})\*)?(h100|cpu|v4|v5e|v5p|v6e):(\d{1,9}(?:x\d{1,9})*)", name)
    if not match:
        raise UserError(f"a topology is named like {EXPECTED}, found {name!r}")
    kind, sizes, slices = match[2], tuple(map(int, match[3].split("x"))), int(match[1] or 1)
    dimensions = TPU_DIMENSIONS.get(kind, 1)
    nodes = kind == "h100" and len(sizes) == 2 and not match[1]
    if not (len(sizes) == dimensions or nodes) or min(*sizes, slices) < 1:
        shape = "x".join("ABC"[:dimensions]) + " or h100:NODESxA" * (kind == "h100")
        raise UserError(
            f"the topology {kind} is named {kind}:{shape}, numbers of at least 1, found {name!r}"
        )
    if kind == "cpu" and match[1]:
        raise UserError(f"simulated CPUs are one slice, cpu:8; found {name!r}")
    if nodes:
        slices, sizes = sizes[0], sizes[1:]
    if kind == "h100" and sizes[0] > GPUS_PER_NODE:
        if sizes[0] % GPUS_PER_NODE or slices > 1:
            raise UserError(
                f"more than {GPUS_PER_NODE} GPUs are nodes of {GPUS_PER_NODE}; expected a multiple "
                f"of them, as h100:64 or h100:8x8, found {name!r}"
            )
        slices, sizes = sizes[0] // GPUS_PER_NODE, (GPUS_PER_NODE,)
    return Shape(kind, slices, sizes)


def prepare(name: str) -> None:
    """Sets up JAX for `get(name)`; call it before JAX opens any device.

    Raises:
      UserError: a malformed name, or the compiler is not installed.
    """
    shape = parse_name(name)
    kind = shape.kind
    memory.check_host(
        shape.devices * 2**20,  # of each device's description and threads, more or less
        what=f"the compiler's model of {name}",
        fix=f"compile for fewer devices; names are like {EXPECTED}",
    )
    # The program is for another machine: an accelerator of this one is left alone.
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", shape.devices)
        return
    if kind == "h100":
        if not any(map(_installed, ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"))):
            raise UserError(f"compiling for {name} needs jax's CUDA wheels, found none; {INSTALL}")
        return
    if not _installed("libtpu"):
        raise UserError(f"compiling for {name} needs the wheel libtpu, found none; {INSTALL}")
    if warning := other_libtpu(importlib.metadata.requires("jax"), _version("libtpu")):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    # Without these libtpu looks for a TPU host and its neighbours.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def other_libtpu(requirements: Iterable[str] | None, version: str) -> str:
    """Returns a warning about a libtpu of another series than JAX asks for, "" about a right one.

    With a wrong one, a program compiled for half an hour, and then jaxlib could not read its text.

    Args:
      requirements: requirements of the wheel jax, such as "libtpu==0.0.42.*; extra == 'tpu'".
      version: version of the wheel libtpu.
    """
    pinned = re.search(r"libtpu\s*==\s*([\d.]+)\.\*", "\n".join(requirements or ()))
    if not pinned or f"{version}.".startswith(f"{pinned[1]}."):
        return ""
    return (
        f"jax {jax.__version__} expects libtpu {pinned[1]}.*, found {version}, whose programs it "
        f"may not be able to read; {INSTALL}"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is absent
        return False


def _version(wheel: str) -> str:
    try:
        return importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return ""


def get(name: str) -> Topology:
    """Returns a topology by name, after `prepare`.

    Raises:
      UserError: a malformed name, or a shape that the compiler does not know.
    """
    shape = parse_name(name)
    kind, count = shape.kind, shape.devices
    if kind == "cpu":
        found = jax.devices("cpu")
        if len(found) < count:
            raise UserError(
                f"{name} needs {count} simulated devices, found {len(found)}; run with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            )
        return Topology(name, "cpu", tuple(found[:count]), None)
    if kind == "h100":
        # What a real device reports about itself: NVIDIA H100 80GB HBM3, CUDA 12.9, cuDNN 9.8.
        target = importlib.resources.files("microdit_jax.xla") / "h100_target_config.txtpb"
        options: dict[str, Any] = {
            "platform": "cuda",
            "topology_name": "H100",
            "target_config": target.read_text(),
            # Slices, hosts of a slice, devices of a host: to JAX each node is a slice.
            "topology": f"{shape.slices}x1x{shape.sizes[0]}",
        }
    else:
        one = shape._replace(slices=1).name
        options = {"platform": "tpu", "topology_name": one}
        if shape.slices > 1:
            options["num_slices"] = shape.slices
    try:
        devices = tuple(jax_topologies.get_topology_desc(**options).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"the compiler knows no topology {name!r} ({reason}); names are like {EXPECTED}"
        ) from error
    return Topology(shape.name, options["platform"], devices, chip_of(devices[0].device_kind))
