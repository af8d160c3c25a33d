"""Times training, sampling, their parts and the data loader, on this machine.

Examples:
  python -m microdit_jax.xla.bench --what=train_step,forward,sampler
  python -m microdit_jax.xla.bench --what=train_step --remat=none,block,dots --dtype=bfloat16
  python -m microdit_jax.xla.bench --what=moe,attention --attention=xla,looped --moe=gather,onehot
  python -m microdit_jax.xla.bench --what=loader --input=latents/cc12m --images_per_second=3060

--what takes train_step, forward, sampler, moe, attention and loader. Flags with several values make
a grid of variants. Each is compiled without the cache, and then takes turns with a large matmul: on
a machine that others use, ratios say more than seconds. "% of the matmul's" compares the two rates
of operations, counted from the network's sizes. benchmarks.against_reference also times a checkout
of the PyTorch reference in the same turns. Experts have no ragged form: in expert choice all take
the same number of tokens.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.xla.bench.__main__")

import math
from pathlib import Path

from absl import flags

from microdit_jax.commands.cli import absl_command
from microdit_jax.errors import UserError
from microdit_jax.files import check_writable

WHAT = flags.DEFINE_list("what", ["train_step"], "Workloads to time; see above.")
ARCH = flags.DEFINE_string("arch", "Tiny_2", "The network: Tiny_2 or XL_2.")
SIDE = flags.DEFINE_integer("input_size", 32, "Side of its latents: 32 for 256 px, 64 for 512.")
BATCH = flags.DEFINE_integer(
    "batch_size", 8, "Images of a training step, and of moe, attention.", lower_bound=1
)
IMAGES = flags.DEFINE_integer("images", 4, "Images of forward and sampler.", lower_bound=1)
MASK = flags.DEFINE_float("mask_ratio", 0.75, "Share of patches that the training step drops.")
STEPS = flags.DEFINE_integer(
    "sampler_steps", 4, "Steps n of the sampler, which takes 2 n - 1 evaluations.", lower_bound=1
)
ATTENTION = flags.DEFINE_list("attention", None, "Attention; by default the platform's quickest.")
MOE = flags.DEFINE_list("moe", ["gather"], "Dispatches of the experts: gather, onehot.")
REMAT = flags.DEFINE_list("remat", ["none"], "Recomputed backwards: none, block or dots.")
DTYPE = flags.DEFINE_list("dtype", ["float32"], "Types of the computation: float32, bfloat16.")
PARTS = flags.DEFINE_list("micro_batches", ["1"], "Parts that the batch of a step is computed in.")
EXPERT = flags.DEFINE_list("expert", ["1"], "Devices that share the experts.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed turns of each variant.", lower_bound=1)
WARM_UP = flags.DEFINE_integer("warm_up", 1, "Turns before the timed ones.", lower_bound=0)
REPORT = flags.DEFINE_string("report", None, "JSON file to write; a chart (PNG) goes beside it.")
DUMP = flags.DEFINE_string("dump", None, "Folder for each variant's HLO and profiler trace.")
INPUT = flags.DEFINE_string("input", None, "loader: a dataset of latents; by default one is made.")
SAMPLES = flags.DEFINE_integer("samples", 2000, "loader: records to make.", lower_bound=1)
RESOLUTION = flags.DEFINE_integer("resolution", 256, "loader: pixels.")
LOADED = flags.DEFINE_integer("loader_batch_size", 64, "loader: records of a batch.", lower_bound=1)
THREADS = flags.DEFINE_list("threads", ["1", "2", "4"], "loader: reading threads.")
SECONDS = flags.DEFINE_float("seconds", 3.0, "loader: time to measure each figure.")
RATE = flags.DEFINE_float("images_per_second", None, "loader: a step's speed, to measure its wait.")
COLD = flags.DEFINE_boolean("cold", False, "loader: drop files from the page cache first (Linux).")
LIBRARY = flags.DEFINE_string(
    "library_python", None, "loader: a Python with mosaicml-streaming, to time its reader too."
)


def _choices(fields: dict[str, tuple], name: str, values: list[str], kind: type = str) -> tuple:
    """Parses the values of a flag, each once; fields[name] has those that are allowed, if any."""
    try:
        found = tuple(dict.fromkeys(kind(value) for value in values))
    except ValueError as error:
        raise UserError(f"--{name} takes whole numbers, found {','.join(values)}") from error
    if not found or not set(found) <= set(fields.get(name, found)):
        raise UserError(
            f"--{name} takes {', '.join(map(str, fields[name]))}, found {','.join(map(str, found))}"
        )
    return found


def _loader_options() -> "loader.LoaderOptions":
    from microdit_jax.xla.bench import loader

    for name, value in (("seconds", SECONDS.value), ("images_per_second", RATE.value)):
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be above 0, found {value:g}")
    return loader.LoaderOptions(
        input=INPUT.value,
        records=SAMPLES.value,
        resolution=RESOLUTION.value,
        batch_size=LOADED.value,
        threads=_choices({}, "threads", THREADS.value, int),
        seconds=SECONDS.value,
        images_per_second=RATE.value,
        cold=COLD.value,
        library_python=LIBRARY.value,
    )


@absl_command()
def main():
    benchmark()


def benchmark(reference: "rows.Reference | None" = None) -> None:
    """Runs the benchmark that the flags ask for.

    Args:
      reference: a `rows.Reference` to time in the same turns.
    """
    if REPORT.value:
        check_writable(REPORT.value)
    if DUMP.value:
        check_writable(DUMP.value, folder=True)
    import jax

    from microdit_jax.models import ARCHES, SHORT_ARCHES, dit, moe
    from microdit_jax.models.config import REMAT_POLICIES
    from microdit_jax.xla.bench import rows, workloads

    names = (*workloads.NAMES, "loader")
    what = _choices({"what": names}, "what", WHAT.value)
    allowed = {"moe": tuple(moe.DISPATCHES), "remat": tuple(REMAT_POLICIES)}
    allowed["dtype"] = ("float32", "bfloat16")
    if ARCH.value not in SHORT_ARCHES:
        raise UserError(f"--arch takes one of {', '.join(SHORT_ARCHES)}, found {ARCH.value!r}")
    config = ARCHES[SHORT_ARCHES[ARCH.value]](
        input_size=SIDE.value, pos_interp_scale=SIDE.value / 32
    )
    choices = {
        "attention": tuple(ATTENTION.value or [dit.for_this_machine(config).attention]),
        "moe_dispatch": _choices(allowed, "moe", MOE.value),
        "remat": _choices(allowed, "remat", REMAT.value),
        "dtype": _choices(allowed, "dtype", DTYPE.value),
        "micro_batches": _choices({}, "micro_batches", PARTS.value, int),
        "expert": _choices({}, "expert", EXPERT.value, int),
    }
    needed = jax.device_count() * math.lcm(*choices["micro_batches"])
    if "train_step" in what and (min(choices["micro_batches"]) < 1 or BATCH.value % needed):
        raise UserError(
            f"--batch_size must be a multiple of {jax.device_count()} devices and of "
            f"--micro_batches, found {BATCH.value} and {','.join(PARTS.value)}"
        )
    if "sampler" in what and IMAGES.value % jax.device_count():
        raise UserError(
            f"--images must be a multiple of {jax.device_count()} devices, found {IMAGES.value}"
        )
    loading = _loader_options() if "loader" in what else None
    size = workloads.Size(BATCH.value, IMAGES.value, MASK.value, STEPS.value)
    report = rows.new(ARCH.value, SIDE.value, size)
    options = rows.TimingOptions(
        REPEATS.value,
        WARM_UP.value,
        reference,
        Path(DUMP.value) if DUMP.value else None,
    )
    variants = [(w, v) for w in what if w != "loader" for v in workloads.grid(w, choices)]
    for name, variant in variants:
        row = rows.measure(name, config, size, variant, options)
        print(rows.line(row), flush=True)
        report["rows"].append(row)
    if loading is not None:
        from microdit_jax.xla.bench import loader

        report["loader"] = loader.measure_all(loading)
    if REPORT.value:
        rows.write(report, Path(REPORT.value))
