"""Floating-point operations of the network, counted from its sizes alone.

Matmuls and attention count, two operations for each multiply-add, as is usual for model FLOPs
utilisation; norms, activations, gathers and recomputation do not.
"""

from microdit_jax.models import masking
from microdit_jax.models.config import CAPTION_MLP_RATIO, BlockShape, DiTConfig
from microdit_jax.models.layers import TIMESTEP_FEATURES
from microdit_jax.models.moe import slots_of

TRAIN_OVER_FORWARD = 3  # the backward pass takes two matmuls for each of the forward pass


def forward_flops(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> int:
    """Operations of the forward pass on one image.

    Args:
      mask_ratio: share of the patches dropped after the mixer.
      caption_length: caption tokens l; 77 for CLIP.
    Raises:
      UserError: a mask ratio outside [0, 1), or one that keeps no token.
    """
    d, d_mixer, t, l = cfg.dim, cfg.patch_mixer_dim, cfg.num_tokens, caption_length  # noqa: E741
    kept = masking.num_kept(t, mask_ratio)
    patch = cfg.patch_size**2 * cfg.in_channels

    last = t if cfg.unmasked_blocks else kept  # tokens that are predicted
    total = _linear(t, patch, d) + _linear(last, d, patch) + _linear(1, d, 2 * d)  # both ends
    total += _linear(1, TIMESTEP_FEATURES, d) + _linear(1, d, d)  # noise level
    total += _caption_tower(cfg, l)
    if cfg.mixer_projects:
        total += _linear(t + l, d, d_mixer) + _linear(last, d_mixer, d)
    total += sum(block_flops(cfg, shape, t, l, d_mixer) for shape in cfg.mixer_blocks())
    blocks = zip(cfg.backbone_blocks(), cfg.backbone_tokens(kept), strict=True)
    total += sum(block_flops(cfg, shape, tokens, l, d) for shape, tokens in blocks)
    return total


def train_flops(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> int:
    """Operations of the forward and backward pass on one image, without any recomputation."""
    return TRAIN_OVER_FORWARD * forward_flops(cfg, mask_ratio, caption_length)


def recomputed_share(cfg: DiTConfig, mask_ratio: float, caption_length: int) -> float:
    """Operations that the config's remat repeats in the backward pass, over one forward pass's.

    "block" repeats all of every block; "dots" attention's scores and weighted sums alone, and not
    even those where one kernel computes them.
    """
    if cfg.remat == "none":
        return 0.0
    t, l = cfg.num_tokens, caption_length  # noqa: E741
    kept, again = masking.num_kept(t, mask_ratio), 0
    mixer, backbone = cfg.mixer_blocks(), cfg.backbone_blocks()
    groups = (
        (mixer, [t] * len(mixer), cfg.patch_mixer_dim),
        (backbone, cfg.backbone_tokens(kept), cfg.dim),
    )
    for blocks, counts, d in groups:
        for shape, tokens in zip(blocks, counts, strict=True):
            if cfg.remat == "block":
                again += block_flops(cfg, shape, tokens, l, d)
                continue
            if cfg.attention != "cudnn":
                again += attention_flops(tokens, tokens, cfg.attention_width(d, shape.qkv_ratio))
                again += attention_flops(tokens, l, d)
    return again / forward_flops(cfg, mask_ratio, caption_length)


def caption_flops(cfg: DiTConfig, caption_length: int) -> int:
    """Operations of `DiT.encode_caption` on one caption, once for all noise levels."""
    d, d_mixer, l = cfg.dim, cfg.patch_mixer_dim, caption_length  # noqa: E741
    total = _caption_tower(cfg, l)
    if cfg.mixer_projects:
        total += _linear(l, d, d_mixer)
    total += len(cfg.mixer_blocks()) * _linear(l, d_mixer, 2 * d_mixer)
    return total + len(cfg.backbone_blocks()) * _linear(l, d, 2 * d)


def _linear(rows: int, features_in: int, features_out: int) -> int:
    return 2 * rows * features_in * features_out


def attention_flops(queries: int, keys: int, hidden: int) -> int:
    """Operations of the scores and of the weighted sum of the values, over all heads."""
    return 2 * _linear(queries, hidden, keys)


def _self_attention(t: int, d: int, hidden: int) -> int:
    return _linear(t, d, 3 * hidden) + attention_flops(t, t, hidden) + _linear(t, hidden, d)


def _swiglu(t: int, d: int, hidden: int) -> int:
    return 3 * _linear(t, d, hidden)


def _caption_tower(cfg: DiTConfig, l: int) -> int:  # noqa: E741
    """Projection, block and pooled vector of l caption tokens."""
    d = cfg.dim
    total = _linear(l, cfg.caption_channels, d) + _linear(l, d, d) + 2 * _linear(1, d, d)
    return total + _self_attention(l, d, d) + _swiglu(l, d, cfg.ffn_width(d, CAPTION_MLP_RATIO))


def expert_flops(cfg: DiTConfig, t: int, d: int, mlp_ratio: float) -> int:
    """Operations of an expert layer on one image: gate, experts, and dispatch if it is one-hot."""
    e, slots = cfg.num_experts, slots_of(cfg.expert_capacity, t, cfg.num_experts)
    total = _linear(t, d, e) + 2 * _linear(e * slots, d, cfg.expert_width(d, mlp_ratio))
    if cfg.moe_dispatch == "onehot":  # tokens to slots and back
        total += 2 * _linear(e * slots, t, d)
    return total


def block_flops(cfg: DiTConfig, shape: BlockShape, t: int, l: int, d: int) -> int:  # noqa: E741
    """Operations of one block on t tokens of width d and l caption tokens."""
    hidden = cfg.attention_width(d, shape.qkv_ratio)
    total = _linear(1, cfg.dim, 6 * d) + _self_attention(t, d, hidden)
    total += 2 * _linear(t, d, d) + _linear(l, d, 2 * d) + attention_flops(t, l, d)
    if shape.is_moe:
        return total + expert_flops(cfg, t, d, shape.mlp_ratio)
    return total + _swiglu(t, d, cfg.ffn_width(d, shape.mlp_ratio))
