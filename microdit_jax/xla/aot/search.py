"""Searches the largest micro-batch that fits."""

import bisect
import contextlib
import dataclasses
from typing import Any

from microdit_jax.errors import UserError
from microdit_jax.xla.aot import analysis
from microdit_jax.xla.aot.analysis import CompileRequest
from microdit_jax.xla.aot.compile import DoesNotFit, say


def find(request: CompileRequest) -> dict[str, Any]:
    """Returns the report of the largest train.micro_batch_size that fits.

    Its "tried" maps each size that was compiled to its peak memory, None where the compiler refused
    it.

    Raises:
      UserError: not even one image at a time fits.
    """
    config, topology = request.config.copy_and_resolve_references(), request.topology
    request = dataclasses.replace(request, config=config)
    share = config.train.batch_size // len(topology.devices)
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    fitting, too_large, best = -1, len(sizes), None  # indices into sizes
    tried: dict[int, float | None] = {}
    memory: dict[str, Any] | None = None
    while too_large - fitting > 1:
        i = _promising(sizes, memory) if memory or not tried else (fitting + too_large) // 2
        i = min(max(i, fitting + 1), too_large - 1)
        config.train.micro_batch_size = sizes[i]
        found, fits, tried[sizes[i]] = None, False, None
        with contextlib.suppress(DoesNotFit):
            found = analysis.analyse(request)
            memory = dict(found["memory"], size=sizes[i])
            fits, tried[sizes[i]] = memory.get("fits", True), memory["peak"]
        say(f"micro-batch {sizes[i]}: {'fits' if fits else 'does not fit'}")
        if fits:
            fitting, best = i, found
        else:
            too_large = i
    if best is None:
        raise UserError(
            f"not even one image at a time fits on {topology.name}; use "
            "model.options.remat=block, more chips, or a wider mesh.fsdp"
        )
    return best | {"tried": tried}


def _promising(sizes: list[int], memory: dict[str, Any] | None) -> int:
    """Returns the index of the largest size that should fit, by the memory of one "size".

    Memory beside the arguments is nearly linear in the images at a time. Before the memory of any
    size is known the largest is tried: where it fits, one compilation is enough.
    """
    if memory is None:
        return len(sizes) - 1
    per_image = (memory["peak"] - memory["arguments"]) / memory["size"]
    return bisect.bisect(sizes, (memory["usable"] - memory["arguments"]) / per_image) - 1
