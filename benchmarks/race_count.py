"""Counts the operations of a race's training steps, by models/flops.py and as compiled."""

from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from benchmarks.race_runs import CANDIDATES, Entrant, Settings, operations, run_configs
from microdit_jax.encoders.registry import text_encoder
from microdit_jax.sharding import make_mesh
from microdit_jax.xla.aot import programs
from microdit_jax.xla.hlo import count


def compiled_flops(config: ConfigDict) -> float:
    """Operations of all matmuls of one training step on one device, from its optimised HLO."""
    tokens = text_encoder(config.data.text_encoder).max_tokens
    mesh = make_mesh(devices=jax.devices()[:1])
    compiled = programs.training(config, mesh, caption_length=tokens).lower().compile()
    return count.count(compiled.as_text() or "").flops


def table(names: Sequence[str], base: ConfigDict, images: int = 4) -> str:
    """Returns the operations of a step in each candidate's first stage, as Markdown.

    Args:
      images: of a batch.
    """
    base = base.copy_and_resolve_references()
    base.train.batch_size = images
    rows = [["candidate", "network", "optimiser", "compiled", "compiled over both"], ["---"] * 5]
    for name in names:
        entrant = Entrant(name, 1e-3, 0, (2,) * len(CANDIDATES[name].stages))
        config = run_configs(entrant, base, Settings("data"))[0]
        network, own = operations(config)
        found = compiled_flops(config)
        figures = (f"{x / 1e6:.2f} MFLOP" for x in (network, own, found))
        rows.append([name, *figures, f"{found / (network + own):.4f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
