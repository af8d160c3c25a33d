"""Times our network beside the PyTorch reference, in turns and in one process, on CPUs.

  python -m benchmarks.against_reference --reference=FOLDER --what=train_step,forward,sampler

FOLDER is a checkout of the reference, which holds micro_diffusion/. All other flags are those of
`python -m microdit_jax.xla.bench`. Both networks have the same weights, data and threads.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("benchmarks.against_reference")

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from convert import reference
from microdit_jax.commands.cli import absl_command
from microdit_jax.convert.dit import to_torch
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.models import dit
from microdit_jax.models.dit import DiTConfig
from microdit_jax.sampling.schedules import edm_levels
from microdit_jax.xla.bench import __main__ as bench
from microdit_jax.xla.bench import workloads
from microdit_jax.xla.bench.workloads import Size

REFERENCE = flags.DEFINE_string("reference", None, "Folder of a checkout of the reference.")
flags.adopt_module_key_flags(bench)
GUIDANCE_SCALE = 5.0


def reference_work(
    folder: Path, what: str, config: DiTConfig, size: Size, device: str = "cpu"
) -> Callable[[], Any] | None:
    """Prepares the reference for one piece of work: a `rows.Reference`, given the folder.

    Args:
      device: PyTorch's, "cpu" or "cuda".
    Raises:
      UserError: another platform than CPUs for "cpu", no PyTorch, or no checkout in the folder.
    """
    if what not in ("train_step", "forward", "sampler"):
        return None
    if device == "cpu" and jax.default_backend() != "cpu":
        raise UserError(
            f"--reference is timed on CPUs, found {jax.default_backend()}; set JAX_PLATFORMS=cpu"
        )
    reference.check(folder)
    params = jax.tree.map(np.asarray, workloads.random_tree(dit.abstract_params(config)))
    # PyTorch writes to its weights, hence copies, and has them in C order.
    tensors = {key: np.array(v, order="C") for key, v in to_torch(params, config).items()}
    theirs = reference.ReferenceWork(folder, config, tensors, device)
    theirs.set_threads(len(os.sched_getaffinity(0)))
    if what == "train_step":
        data = workloads.inputs(config, size.batch)
        return lambda: theirs.train_step(data["x"], data["y"], size.mask_ratio)
    data = workloads.inputs(config, size.images)
    if what == "forward":
        return lambda: theirs.forward(data["x"], data["t"], data["y"])
    sigmas = edm_levels(size.sampler_steps, EdmConfig())
    return lambda: theirs.sampler(data["x"], data["y"], sigmas, GUIDANCE_SCALE)


@absl_command(required=("reference",))
def main():
    bench.benchmark(functools.partial(reference_work, Path(str(REFERENCE.value))))
