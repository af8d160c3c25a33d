"""A deep network's report from shallow ones: compile times grow with every block, most figures too.

The widths of blocks grow over the depth, and what a block costs grows with its widths; so a block
of its kind's mean widths costs the kind's mean. Four networks of 5 to 7 such blocks are compiled:
one with a block of each kind at least, and one each with two mixer blocks, one dense and one expert
block more.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from microdit_jax.errors import UserError
from microdit_jax.models import flops, masking
from microdit_jax.models.config import BlockShape, DiTConfig
from microdit_jax.models.layers import round_up


class Term(NamedTuple):
    """weight * (figures of `network` - figures of `minus`); `minus` None: its figures alone."""

    name: str
    weight: float
    network: DiTConfig
    minus: DiTConfig | None


def terms(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> list[Term]:
    """What to compile and how to add it up.

    Raises:
      UserError: the network has other kinds of blocks, or not more than the shallow ones.
    """
    mixer, backbone = cfg.mixer_blocks(), cfg.backbone_blocks()
    dense = [b for b in backbone if not b.is_moe]
    experts = [b for b in backbone if b.is_moe]
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

    def weight(blocks: Sequence[BlockShape], made: int, representative: BlockShape) -> float:
        """Blocks that are missing, in representative ones of rounded width, by operations."""
        cost = [flops.block_flops(cfg, b, kept, caption_length, cfg.dim) for b in blocks]
        one = flops.block_flops(cfg, representative, kept, caption_length, cfg.dim)
        return sum(cost) / one - made

    blocks = shallow[3].backbone_blocks()
    return [
        Term("base", 1.0, shallow[0], None),
        Term("mixer pair", (len(mixer) - 2) / 2, shallow[1], shallow[0]),
        Term("dense block", weight(dense, 2, blocks[0]), shallow[2], shallow[0]),
        Term("expert block", weight(experts, 1, blocks[1]), shallow[3], shallow[2]),
    ]


def extrapolate(parts: Sequence[Term], figures: Callable[[DiTConfig], Any]) -> Any:
    """The sum of the terms, of all numbers in the (nested) dictionary that `figures` returns."""
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
    """The run configuration with another network, all of its sizes given."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.arch = "DiT"
        config.model.options = ConfigDict(dataclasses.asdict(cfg))
    return config


def _mean(cfg: DiTConfig, blocks: Sequence[BlockShape]) -> tuple[float, float]:
    """Mean ratios of the widths that blocks have after rounding up."""
    d, heads = cfg.dim, 2 * cfg.head_dim
    hidden = [d if b.qkv_ratio == 1 else round_up(int(d * b.qkv_ratio), heads) for b in blocks]
    return sum(hidden) / len(blocks) / d, sum(b.mlp_ratio for b in blocks) / len(blocks)


def _shallow(cfg: DiTConfig, mixer: int, depth: int, dense, experts) -> DiTConfig:
    ratios = [experts if i % 2 and i < depth - 1 else dense for i in range(depth)]
    return dataclasses.replace(
        cfg,
        patch_mixer_depth=mixer,
        depth=depth,
        qkv_multipliers=tuple(qkv for qkv, _ in ratios),
        ffn_multipliers=tuple(mlp for _, mlp in ratios),
    )
