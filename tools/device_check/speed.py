"""Parts that ask how quick a GPU is, and where its time goes."""

import functools
import gc
import importlib.util
import math
import shutil

import jax

from benchmarks.against_reference import reference_work
from microdit_jax.files import read_json
from microdit_jax.machine.chips import chip_of
from microdit_jax.models import dit
from microdit_jax.models.dit import DiTConfig
from microdit_jax.xla import roofline
from microdit_jax.xla.bench import rows, timing, workloads
from microdit_jax.xla.bench.workloads import Size
from microdit_jax.xla.hlo.count import count
from tools.device_check import kernels
from tools.device_check.machine import ROOT
from tools.device_check.work import Setup

STAGE_1 = ROOT / "docs" / "aot" / "res_256_pretrain_h100_8.json"
LARGEST = 256  # images at a time on a GPU, in the paper's stage 1
STATE_BYTES = 4 * 4  # of each parameter: weight, two moments, gradient


# ------------------------------------------------------------------------------ the step
def step(setup: Setup) -> None:
    """Times stage 1's step at the largest micro-batch, and its kernels beside the roofline."""
    config, variant = setup.config(32), setup.variant()
    refused: list[int] = []
    for images in micro_batches(setup, config):
        try:
            work = workloads.train_step_workload(config, Size(batch=images), variant)
            turns = 3 if setup.small else 10
            (timed,) = timing.take_turns([work.run], repeats=turns, warm_up=2)
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        refused.append(images)
        setup.tell(refused=", ".join(map(str, refused)))
        gc.collect()
    else:
        raise RuntimeError(f"none of {', '.join(map(str, refused))} images at a time fit")
    chip, seconds = chip_of(jax.devices()[0].device_kind), timed.summary()["median"]
    setup.tell(
        images=images,
        refused=", ".join(map(str, refused)),
        **milliseconds(timed, work.compile_seconds),
        images_per_second=images / seconds,
        mfu=work.operations / seconds / chip.bfloat16_flops if chip else None,
        peak_gigabytes=_peak_gigabytes(),
    )
    memory = work.compiled.memory_analysis()
    if memory is not None:
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes
        total += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        setup.tell(compiled_gigabytes=total / 1e9)
    counts = count(work.compiled.as_text() or "")
    setup.tell(gigabytes_moved=counts.num_bytes / 1e9)
    if roofline.is_known(chip, (0,)):
        bound = roofline.step_time(counts, chip, (0,)).kernels
        setup.tell(bound_ms=1e3 * bound, over_bound=seconds / bound)
    traced = kernels.traced(work.run, counts)
    setup.tell(**kernels.compared(traced, counts, chip, seconds))


def micro_batches(setup: Setup, config: DiTConfig) -> list[int]:
    """Returns sizes to try: halves of LARGEST, from the first that should fit the memory.

    Memory is estimated by the committed report of stage 1, compiled ahead of time for eight H100.
    """
    if setup.small:
        return [jax.device_count()]
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    report = read_json(STAGE_1)
    per_image = report["memory"]["temporaries"] / report["images_at_once"]
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dit.abstract_params(config)))
    sizes = [LARGEST >> i for i in range(7)]
    return [n for n in sizes if STATE_BYTES * weights + n * per_image < limit] or sizes[-1:]


def _peak_gigabytes() -> float | None:
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 1e9


def milliseconds(timed: timing.Timed, compile_seconds: float) -> dict[str, float]:
    """Returns median and lowest time in ms, and the seconds of compiling."""
    found = timed.summary()
    return {
        "ms": 1e3 * found["median"],
        "lowest_ms": 1e3 * found["lowest"],
        "compile_seconds": compile_seconds,
    }


# ------------------------------------------------------------------------------ the reference
def _beside(setup: Setup, what: str, side: int, size: Size, repeats: int) -> rows.Row:
    """Times one workload, in turns with the reference's on this GPU where there is one."""
    theirs = None
    if setup.reference is not None and importlib.util.find_spec("torch") is not None:
        import torch  # pyright: ignore[reportMissingImports]

        if torch.cuda.is_available():
            theirs = functools.partial(reference_work, setup.reference, device="cuda")
    options = rows.TimingOptions(repeats, 1, theirs)
    return rows.measure(what, setup.config(side), size, setup.variant(), options)


def _told(row: rows.Row) -> dict[str, float]:
    found = {
        "ms": 1e3 * row["seconds"]["median"],
        "lowest_ms": 1e3 * row["seconds"]["lowest"],
        "compile_seconds": row["compile_seconds"],
    }
    if "reference_seconds" in row:
        found["reference_ms"] = 1e3 * row["reference_seconds"]["median"]
        found["ratio"] = row["over_reference"]["median"]
    return found


def reference_step(setup: Setup) -> None:
    """Times the reference's training step beside ours, on the same weights and data."""
    images = jax.device_count() if setup.small else 32
    row = _beside(setup, "train_step", 32, Size(batch=images), repeats=5)
    setup.tell(images=images, **_told(row))


def sampling(setup: Setup) -> None:
    """Times sampling at 512 px, in turns with the reference's where there is one."""
    images = jax.device_count() if setup.small else 8
    size = Size(images=images, sampler_steps=2 if setup.small else 30)
    row = _beside(setup, "sampler", 64, size, repeats=1 if setup.small else 3)
    setup.tell(images=images, images_per_second=images / row["seconds"]["median"], **_told(row))
    if "reference_seconds" in row:
        setup.tell(reference_images_per_second=images / row["reference_seconds"]["median"])


# ------------------------------------------------------------------------------ autotuning
def forward(setup: Setup) -> None:
    """Times a forward pass; with or without autotuning, as this process's XLA_FLAGS say."""
    setup.tell(ptxas=_ptxas())
    size = Size(images=1 if setup.small else 16)
    work = workloads.forward_workload(setup.config(32), size, setup.variant())
    (timed,) = timing.take_turns([work.run], repeats=3 if setup.small else 20, warm_up=2)
    setup.tell(**milliseconds(timed, work.compile_seconds))


def _ptxas() -> str:
    """Says where ptxas is, which compiles kernels of NVIDIA's GPUs."""
    if shutil.which("ptxas"):
        return "on the PATH"
    wheels = ("nvidia.cuda_nvcc", "nvidia.cu13")
    for wheel in wheels:
        try:
            if importlib.util.find_spec(wheel) is not None:
                return f"of the wheel {wheel}"
        except ModuleNotFoundError:
            continue
    return "none"
