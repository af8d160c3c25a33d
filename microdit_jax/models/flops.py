"""Floating-point operations of the network, counted from its sizes alone.

Counted are matrix products and attention, two operations for each multiply-add, as is usual for
model FLOPs utilisation; norms, activations and gathers are left out, recomputation too.
"""

from microdit_jax.models import masking
from microdit_jax.models.config import BlockShape, DiTConfig
from microdit_jax.models.layers import round_up
from microdit_jax.models.moe import slots_of

TRAIN_OVER_FORWARD = 3  # the backward pass takes two products for each of the forward pass


def forward_flops(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> int:
    """Operations of one image's forward pass.

    Args:
      mask_ratio: share of the patches dropped after the mixer.
      caption_length: caption tokens l; 77 for CLIP.
    Raises:
      UserError: a mask ratio outside [0, 1), or one that keeps no token.
    """
    d, d_mixer, t, l = cfg.dim, cfg.patch_mixer_dim, cfg.num_tokens, caption_length  # noqa: E741
    kept = masking.num_kept(t, mask_ratio)
    patch = cfg.patch_size**2 * cfg.in_channels

    total = _linear(t, patch, d) + _linear(kept, d, patch) + _linear(1, d, 2 * d)  # ends
    total += _linear(1, 512, d) + _linear(1, d, d)  # noise level
    total += _linear(l, cfg.caption_channels, d) + _linear(l, d, d) + 2 * _linear(1, d, d)
    total += _self_attention(l, d, d) + _swiglu(l, d, 4.0, cfg.multiple_of)  # caption block
    if cfg.mixer_projects:
        total += _linear(t + l, d, d_mixer) + _linear(kept, d_mixer, d)
    total += sum(block_flops(cfg, shape, t, l, d_mixer) for shape in cfg.mixer_blocks())
    total += sum(block_flops(cfg, shape, kept, l, d) for shape in cfg.backbone_blocks())
    return total


def train_flops(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> int:
    """Operations of one image's forward and backward pass, without any recomputation."""
    return TRAIN_OVER_FORWARD * forward_flops(cfg, mask_ratio, caption_length)


def recomputed_share(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> float:
    """What the backward pass computes again by the config's remat, over one forward pass.

    "block" repeats all of every block; "dots" attention's and the experts' products, which have
    batch dimensions.
    """
    if cfg.remat == "none":
        return 0.0
    t, l = cfg.num_tokens, caption_length  # noqa: E741
    kept, again = masking.num_kept(t, mask_ratio), 0
    groups = ((cfg.mixer_blocks(), t, cfg.patch_mixer_dim), (cfg.backbone_blocks(), kept, cfg.dim))
    for blocks, tokens, d in groups:
        for shape in blocks:
            if cfg.remat == "block":
                again += block_flops(cfg, shape, tokens, l, d)
                continue
            again += attention_flops(tokens, tokens, _hidden(cfg, shape, d))
            again += attention_flops(tokens, l, d)
            if shape.is_moe:
                again += expert_flops(cfg, tokens, d, shape.mlp_ratio) - _linear(
                    tokens, d, cfg.num_experts
                )
    return again / forward_flops(cfg, mask_ratio, caption_length)


def caption_flops(cfg: DiTConfig, caption_length: int) -> int:
    """Operations of one caption that are the same at every noise level: `DiT.encode_caption`."""
    d, d_mixer, l = cfg.dim, cfg.patch_mixer_dim, caption_length  # noqa: E741
    total = _linear(l, cfg.caption_channels, d) + _linear(l, d, d) + 2 * _linear(1, d, d)
    total += _self_attention(l, d, d) + _swiglu(l, d, 4.0, cfg.multiple_of)
    if cfg.mixer_projects:
        total += _linear(l, d, d_mixer)
    total += len(cfg.mixer_blocks()) * _linear(l, d_mixer, 2 * d_mixer)
    return total + len(cfg.backbone_blocks()) * _linear(l, d, 2 * d)


def _hidden(cfg: DiTConfig, shape: BlockShape, d: int) -> int:
    """Width of self-attention."""
    return d if shape.qkv_ratio == 1 else round_up(int(d * shape.qkv_ratio), 2 * cfg.head_dim)


def _linear(rows: int, features_in: int, features_out: int) -> int:
    return 2 * rows * features_in * features_out


def attention_flops(queries: int, keys: int, hidden: int) -> int:
    """Scores and the weighted sum, over all heads."""
    return 2 * _linear(queries, hidden, keys)


def _self_attention(t: int, d: int, hidden: int) -> int:
    return _linear(t, d, 3 * hidden) + attention_flops(t, t, hidden) + _linear(t, hidden, d)


def _swiglu(t: int, d: int, mlp_ratio: float, multiple_of: int) -> int:
    return 3 * _linear(t, d, round_up(int(2 * int(d * mlp_ratio) / 3), multiple_of))


def expert_flops(cfg: DiTConfig, t: int, d: int, mlp_ratio: float) -> int:
    """One image's forward pass of an expert layer: gate, experts, and one-hot dispatch if so."""
    e, slots = cfg.num_experts, slots_of(cfg.expert_capacity, t, cfg.num_experts)
    total = _linear(t, d, e) + 2 * _linear(
        e * slots, d, round_up(int(d * mlp_ratio), cfg.multiple_of)
    )
    if cfg.moe_dispatch == "onehot":  # tokens to slots and back
        total += 2 * _linear(e * slots, t, d)
    return total


def block_flops(cfg: DiTConfig, shape: BlockShape, t: int, l: int, d: int) -> int:  # noqa: E741
    """Operations of one block on t tokens of width d and l caption tokens."""
    total = _linear(1, cfg.dim, 6 * d) + _self_attention(t, d, _hidden(cfg, shape, d))
    total += 2 * _linear(t, d, d) + _linear(l, d, 2 * d) + attention_flops(t, l, d)
    if shape.is_moe:
        return total + expert_flops(cfg, t, d, shape.mlp_ratio)
    return total + _swiglu(t, d, shape.mlp_ratio, cfg.multiple_of)
