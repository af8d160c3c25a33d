"""The process of one part: python -m tools.device_check.work MODULE:FUNCTION RESULT NETWORK ..."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from microdit_jax.files import write_text
from microdit_jax.models import ARCHES, SHORT_ARCHES, dit
from microdit_jax.models.config import DiTConfig
from microdit_jax.xla.bench.workloads import Variant

# A narrower mixer, with experts, and one dense block.
SMALL = {
    "dim": 64, "depth": 1, "head_dim": 32, "multiple_of": 32, "caption_channels": 64,
    "patch_mixer_depth": 1, "patch_mixer_dim": 32, "patch_mixer_mlp_ratio": 2.0, "num_experts": 2,
    "expert_capacity": 1.0, "experts_every_n": 1, "use_bias": False,
}  # fmt: skip


class Setup(NamedTuple):
    """Choices of one part, whose figures go to the file `result` as they are found."""

    result: Path
    network: str
    golden: Path
    reference: Path | None
    figures: dict[str, Any]

    @property
    def small(self) -> bool:
        """True where the check itself is tried."""
        return self.network == "small"

    def config(self, side: int) -> DiTConfig:
        """Returns the network for latents of a side: 32 for 256 px, 64 for 512."""
        if self.small:
            return DiTConfig(input_size=side // 4, in_channels=4, **SMALL)  # pyright: ignore
        return ARCHES[SHORT_ARCHES[self.network]](input_size=side, pos_interp_scale=side / 32)

    def variant(self) -> Variant:
        """Returns how the network is computed here: on GPUs in bfloat16, attention by cuDNN."""
        gpu = jax.default_backend() == "gpu"
        dtype = "bfloat16" if gpu else "float32"
        config = dataclasses.replace(self.config(32), dtype=dtype)
        attention = "cudnn" if gpu else dit.for_this_machine(config).attention
        return Variant(attention=attention, dtype=dtype)

    def tell(self, **figures: Any) -> None:
        """Adds figures, and writes all of them: what was found before a limit is kept."""
        self.figures.update(figures)
        write_text(self.result, json.dumps(self.figures))


def main(given: list[str]) -> None:
    """Does the work of one part."""
    work, result, network, golden, reference = given
    module, _, function = work.partition(":")
    checkout = Path(reference) if reference else None
    setup = Setup(Path(result), network, Path(golden), checkout, {})
    getattr(importlib.import_module(f"tools.device_check.{module}"), function)(setup)


if __name__ == "__main__":
    main(sys.argv[1:])
