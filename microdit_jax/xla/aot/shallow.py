"""Extrapolates the figures of a deep network from shallow ones, where compilers are slow.

A network's cost is the sum of its blocks' costs, of which there are three kinds: mixer, dense and
expert blocks. A block's cost grows linearly with its widths, so that a block of mean widths has the
mean cost of its kind. Four networks of 5 to 7 blocks of mean widths are compiled: a base with every
kind of block, and three with two more mixer blocks, one more dense block, one more expert block.
Their differences are the costs of one block of each kind.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from microdit_jax.errors import UserError
from microdit_jax.models import flops, masking
from microdit_jax.models.config import BlockShape, DiTConfig


class Term(NamedTuple):
    """One summand: weight * (figures of `network` - figures of `minus`); None counts as 0."""

    name: str
    weight: float
    network: DiTConfig
    minus: DiTConfig | None


def terms(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> list[Term]:
    """Returns the shallow networks to compile, and the weights to add them up with.

    Raises:
      UserError: the network has other kinds of blocks, or is no deeper than the shallow ones.
    """
    mixer, backbone = cfg.mixer_blocks(), cfg.backbone_blocks()
    dense = [b for b in backbone if not b.is_moe]
    experts = [b for b in backbone if b.is_moe]
    if cfg.unmasked_blocks:
        raise UserError(
            "reduced depth needs backbone blocks that see equal tokens, found unmasked_blocks="
            f"{cfg.unmasked_blocks}; leave --reduced_depth out"
        )
    if cfg.experts_every_n != 2 or len(mixer) % 2 or len(mixer) < 4 or len(backbone) < 5:
        raise UserError(
            "reduced depth needs experts in every second block, a mixer of 4, 6, ... blocks and a "
            f"backbone of 5 or more, found experts in every {cfg.experts_every_n}. block, "
            f"{len(mixer)} and {len(backbone)} blocks; leave --reduced_depth out"
        )
    shallow = [
        _shallow(cfg, *sizes, _mean(cfg, dense), _mean(cfg, experts))
        for sizes in ((2, 3), (4, 3), (2, 4), (2, 5))
    ]
    kept = masking.num_kept(cfg.num_tokens, mask_ratio)

    def weight(blocks: Sequence[BlockShape], in_base: int, mean: BlockShape) -> float:
        """Counts the blocks that the base lacks, in blocks of mean widths, by operations.

        Widths are rounded up, so that the block of mean widths does not cost exactly the mean.
        """
        cost = [flops.block_flops(cfg, b, kept, caption_length, cfg.dim) for b in blocks]
        one = flops.block_flops(cfg, mean, kept, caption_length, cfg.dim)
        return sum(cost) / one - in_base

    blocks = shallow[3].backbone_blocks()
    return [
        Term("base", 1.0, shallow[0], None),
        Term("mixer pair", (len(mixer) - 2) / 2, shallow[1], shallow[0]),
        Term("dense block", weight(dense, 2, blocks[0]), shallow[2], shallow[0]),
        Term("expert block", weight(experts, 1, blocks[1]), shallow[3], shallow[2]),
    ]


def extrapolate(parts: Sequence[Term], figures: Callable[[DiTConfig], Any]) -> Any:
    """Adds up the terms for every number in the nested dictionary that `figures` returns."""
    total = None
    for part in parts:
        found = figures(part.network)
        minus = figures(part.minus) if part.minus is not None else None
        change = _combine(found, minus, lambda a, b: a - b)
        scaled = _combine(change, None, lambda a, b, w=part.weight: w * a)
        total = scaled if total is None else _combine(total, scaled, lambda a, b: a + b)
    return total


def _combine(a: Any, b: Any, operation: Callable[[float, float], float]) -> Any:
    if isinstance(a, dict):
        other = b if isinstance(b, dict) else {}
        return {key: _combine(value, other.get(key), operation) for key, value in a.items()}
    return operation(a, 0 if b is None else b)


def with_network(config: ConfigDict, cfg: DiTConfig) -> ConfigDict:
    """Returns a copy of the run configuration with another network, all of its sizes given."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.arch = "DiT"
        config.model.options = ConfigDict(dataclasses.asdict(cfg))
    return config


def _mean(cfg: DiTConfig, blocks: Sequence[BlockShape]) -> tuple[float, float]:
    """Returns the mean ratios of attention's and the feed-forward's widths, after rounding up."""
    d = cfg.dim
    hidden = [cfg.attention_width(d, block.qkv_ratio) for block in blocks]
    return sum(hidden) / len(blocks) / d, sum(b.mlp_ratio for b in blocks) / len(blocks)


def _shallow(
    cfg: DiTConfig,
    mixer: int,
    depth: int,
    dense: tuple[float, float],
    experts: tuple[float, float],
) -> DiTConfig:
    """Returns a network with that many mixer and backbone blocks, of the given width ratios."""
    ratios = [experts if i % 2 and i < depth - 1 else dense for i in range(depth)]
    return dataclasses.replace(
        cfg,
        patch_mixer_depth=mixer,
        depth=depth,
        qkv_multipliers=tuple(qkv for qkv, _ in ratios),
        ffn_multipliers=tuple(mlp for _, mlp in ratios),
    )
