"""The parts of a device check in the order they run, and every figure that each of them fills."""

from typing import NamedTuple

# JAX gets one half of the GPU's memory where PyTorch computes in the same process.
_SHARED = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}
_WHOLE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # as machine/compile_options.py sets it
_UNTUNED = {"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}


class Figure(NamedTuple):
    """One figure of the page.

    Attributes:
      key: its name in the JSON.
      text: its name on the page.
      format: of `format(value, ...)`; numbers only.
    """

    key: str
    text: str
    format: str = ".3g"


class Part(NamedTuple):
    """One part of the check.

    Attributes:
      work: module and function of tools.device_check that does it.
      seconds: its time limit.
      needs: what it is skipped without, of machine.NEEDS.
      environment: variables of its process on a GPU.
      table: a list of rows that it also fills, as (key in the JSON, column titles); or None.
    """

    name: str
    title: str
    work: str
    seconds: float
    figures: tuple[Figure, ...]
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    table: tuple[str, tuple[str, ...]] | None = None


def _golden() -> tuple[Figure, ...]:
    found = []
    for name in GOLDEN_FILES:
        for dtype, key, text in (
            ("float32", "relative_l2", "relative L2 of the output"),
            ("float32", "worst_module", "relative L2 of the worst sub-module"),
            ("bfloat16", "relative_l2", "relative L2 of the output"),
            ("bfloat16", "median", "median error of the output, in standard deviations"),
        ):
            found.append(Figure(f"{name}/{dtype}/{key}", f"{name}, {dtype}: {text}"))
    return tuple(found)


GOLDEN_FILES = ("dit_small", "dit_16ch_interp2", "dit_mixer_same_dim")
_TIMES = (
    Figure("ms", "median, ms", ".2f"),
    Figure("lowest_ms", "lowest, ms", ".2f"),
    Figure("compile_seconds", "compiling, s", ".1f"),
)

PARTS = (
    Part(
        "golden",
        "Recorded outputs of the PyTorch reference",
        "correct:golden",
        60,
        _golden(),
        ("golden",),
    ),
    Part(
        "noise",
        "torch.randn(device=cuda) and our noise of that kind",
        "correct:noise",
        30,
        (
            Figure("values_in_one_launch", "values until each thread makes a second four", ",d"),
            Figure("below", "largest difference, fewer values than that"),
            Figure("beyond", "largest difference, two and a half times as many"),
        ),
        ("torch_cuda",),
    ),
    Part(
        "attention",
        "The fused attention beside XLA's, in bfloat16 (on a CPU `looped`, in float32)",
        "correct:fused_attention",
        45,
        tuple(
            Figure(f"{shape}/{key}", f"{shape}-attention: {text}", form)
            for shape in ("self", "cross")
            for key, text, form in (
                ("fused_error", "relative L2 to XLA in float32, fused, output", ".2g"),
                ("xla_error", "the same of XLA's in that type", ".2g"),
                ("fused_gradient_error", "the same of the gradients, fused", ".2g"),
                ("xla_gradient_error", "the same of the gradients, XLA's", ".2g"),
                ("fused_ms", "forward and backward, fused, ms", ".3f"),
                ("xla_ms", "forward and backward, XLA's, ms", ".3f"),
            )
        ),
    ),
    Part(
        "step",
        "Stage 1's training step (XL/2, 256 px, mask 0.75) at the largest micro-batch",
        "speed:step",
        200,
        (
            Figure("images", "images at a time", "d"),
            Figure("refused", "sizes that did not fit", "s"),
            *_TIMES,
            Figure("images_per_second", "images/s", ",.0f"),
            Figure("mfu", "MFU", ".1%"),
            Figure("bound_ms", "lower bound of the step, kernel by kernel, ms", ".1f"),
            Figure("over_bound", "measured over the bound", ".2f"),
            Figure("gigabytes_moved", "bytes that the kernels move, GB", ".1f"),
            Figure("compiled_gigabytes", "memory by the compiler, as xla.aot has it, GB", ".2f"),
            Figure("peak_gigabytes", "memory measured, highest, GB", ".2f"),
            Figure("kernels_ms", "all kernels in the profiler, ms", ".1f"),
            Figure("idle_ms", "step without any kernel, ms", ".1f"),
            Figure("unattributed_ms", "kernels that no instruction could be found for, ms", ".1f"),
            Figure("matmul_ms", "kernels with matmuls, ms", ".1f"),
            Figure("matmul_bound_ms", "their lower bound, ms", ".1f"),
            Figure("other_ms", "all other kernels, ms", ".1f"),
            Figure("other_bound_ms", "their lower bound, ms", ".1f"),
        ),
        (),
        _WHOLE,
        ("kernels", ("kernel", "what", "ms", "bound, ms", "lost, ms", "bound by")),
    ),
    Part(
        "reference_step",
        "The PyTorch reference's training step beside ours, same weights, in turns",
        "speed:reference_step",
        110,
        (
            Figure("images", "images at a time", "d"),
            *_TIMES,
            Figure("reference_ms", "the reference, autocast to bfloat16, median, ms", ".2f"),
            Figure("ratio", "our time over the reference's", ".3f"),
        ),
        ("reference", "torch_cuda"),
        _SHARED,
    ),
    Part(
        "sampling",
        "Sampling at 512 px from embedded captions to latents, 30 steps of Heun's, guidance 5",
        "speed:sampling",
        110,
        (
            Figure("images", "images at a time", "d"),
            *_TIMES,
            Figure("images_per_second", "images/s", ".2f"),
            Figure("reference_images_per_second", "images/s of the reference (with it)", ".2f"),
            Figure("ratio", "our time over the reference's (with it)", ".3f"),
        ),
        (),
        _SHARED,
    ),
    Part(
        "tuned",
        "A forward pass with XLA's autotuning, which ahead-of-time compilation has to do without",
        "speed:forward",
        60,
        (Figure("ptxas", "ptxas", "s"), *_TIMES),
    ),
    Part(
        "untuned",
        "The same forward pass without autotuning",
        "speed:forward",
        60,
        (Figure("ptxas", "ptxas", "s"), *_TIMES),
        (),
        _UNTUNED,
    ),
)
NAMES = tuple(part.name for part in PARTS)
