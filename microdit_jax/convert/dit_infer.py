"""Reads a MicroDiT's config off the shapes of its state dict, so that nobody has to state it."""

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from microdit_jax.convert.arguments import OTHER_KIND, count_blocks
from microdit_jax.convert.dit_table import rename_table
from microdit_jax.errors import UserError
from microdit_jax.machine.placement import round_up
from microdit_jax.models import ARCHES, arch_of
from microdit_jax.models.dit import DiTConfig
from microdit_jax.models.layers import sincos_pos_embed

NEEDED = ("x_embedder.proj.weight", "pos_embed", "y_embedder.y_proj.fc1.weight")
RELEASED_CAPACITY = 2.0  # experts per token in all released models
UNTOLD = ("head_dim", "expert_capacity")  # what changes no shape
# What an architecture leaves open.
OF_ANY_ARCH = (
    *("in_channels", "patch_size", "input_size", "caption_channels", "pos_interp_scale"),
    *("num_experts", "expert_capacity", "experts_every_n"),
)
LARGEST_HEAD = 128  # no wider head exists, so a larger common divisor of widths tells nothing


def infer_config(
    state_dict: Mapping[str, Any],
    *,
    head_dim: int | None = None,
    expert_capacity: float = RELEASED_CAPACITY,
) -> DiTConfig:
    """Returns the config of the network whose state dict this is.

    Sizes come from the tensors' shapes and pos_interp_scale from pos_embed's values; XL/2 and
    Tiny/2 are recognised, any other network gets multipliers that give exactly its widths.

    Args:
      state_dict: the reference's bare names; tensors missing elsewhere are left to from_torch.
      head_dim: width of a head. Shapes tell only that it divides them all; None takes the largest
        common divisor.
      expert_capacity: 2.0 in all released models; the file does not tell.
    Raises:
      UserError: not a MicroDiT, widths no config gives, or a head_dim that shapes leave open.
    """
    missing = [name for name in NEEDED if name not in state_dict]
    if missing:
        found = ", ".join(list(state_dict)[:5]) or "no tensor"
        raise UserError(
            f"expected a MicroDiT state dict, found none of {', '.join(missing)} among its "
            f"{len(state_dict)} tensors ({found}, ...); {OTHER_KIND}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if len(shapes["x_embedder.proj.weight"]) != 4 or len(shapes["pos_embed"]) != 3:
        raise UserError(
            "expected x_embedder.proj.weight (d, channels, p, p) and pos_embed (1, t, d), found "
            f"{shapes['x_embedder.proj.weight']} and {shapes['pos_embed']}; {OTHER_KIND}"
        )
    if state_dict["pos_embed"].dtype.kind not in "fV":  # V: ml_dtypes' types
        raise UserError(
            f"expected pos_embed of a floating type, found {state_dict['pos_embed'].dtype}; save "
            "it as float32"
        )
    dim, channels, patch, _ = shapes["x_embedder.proj.weight"]
    t = shapes["pos_embed"][1]
    if math.isqrt(t) ** 2 != t:
        raise UserError(
            f"expected a square grid of tokens, found pos_embed {shapes['pos_embed']}; "
            "only square models exist"
        )
    backbone, mixer = _blocks(shapes, "blocks", dim), _blocks(shapes, "patch_mixer", dim)
    experts = [b["experts"] for b in backbone + mixer if b["experts"]]
    common = {
        "in_channels": channels,
        "patch_size": patch,
        "input_size": math.isqrt(t) * patch,
        "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][-1],
        "pos_interp_scale": interp_scale(state_dict["pos_embed"]) or 1.0,
        "num_experts": experts[0] if experts else 8,
        "expert_capacity": expert_capacity,
        "experts_every_n": _every(backbone, mixer),
    }
    arch = arch_of(dim, len(backbone), mixer[0]["dim"] if mixer else dim)
    if arch and head_dim in (None, ARCHES[arch]().head_dim):
        config = ARCHES[arch](**common)
        if _share_that_fits(shapes, config) > 0.9:  # from_torch names the rest
            return config
    return _custom(shapes, dim, backbone, mixer, head_dim, common)


def infer_config_strictly(
    state_dict: Mapping[str, Any],
    *,
    head_dim: int | None = None,
    expert_capacity: float | None = None,
) -> DiTConfig:
    """Returns infer_config's config, but guesses nothing about a network of unknown architecture.

    No shape depends on a head's width within the attention's, nor on the experts' capacity. XL/2
    and Tiny/2 have been published with theirs; another network's must be given.

    Raises:
      UserError: as infer_config, and for sizes that are missing.
    """
    capacity = RELEASED_CAPACITY if expert_capacity is None else expert_capacity
    config = infer_config(state_dict, head_dim=head_dim, expert_capacity=capacity)
    if known_arch(config):
        return config
    missing = ["head_dim"] if head_dim is None else []
    if expert_capacity is None and _has_experts(config):
        missing.append("expert_capacity")
    if missing:
        raise UserError(
            f"expected the sizes of {' or '.join(ARCHES)}, found a network of width {config.dim} "
            f"and depth {config.depth}, whose {' and '.join(missing)} no shape tells; give "
            f"python -m convert {' '.join(f'--{name}=...' for name in missing)}, or "
            "python -m convert --config=FILE.json"
        )
    return config


def known_arch(config: DiTConfig) -> str | None:
    """Returns the architecture whose every size a config has, but those of latents and experts."""
    mixer_dim = config.patch_mixer_dim if config.use_patch_mixer else config.dim
    arch = arch_of(config.dim, config.depth, mixer_dim)
    if arch is None:
        return None
    same = {name: getattr(config, name) for name in OF_ANY_ARCH}
    return arch if ARCHES[arch](**same) == config else None


def _has_experts(config: DiTConfig) -> bool:
    return any(block.is_moe for block in config.backbone_blocks() + config.mixer_blocks())


def describe_origin(config: DiTConfig, stated: Mapping[str, Any]) -> str:
    """Describes where an inferred config comes from: what was read, given and assumed.

    Args:
      stated: the flags that were given.
    """
    given = [f"{name} {stated[name]:g}" for name in UNTOLD if name in stated]
    assumed = [f"{name} {getattr(config, name):g}" for name in UNTOLD if name not in stated]
    assumed.append(f"norm_eps {config.norm_eps:g}")
    arch = known_arch(config)
    whose = f"{arch}'s" if arch else "the reference's"
    said = f"; given: {', '.join(given)}" if given else ""
    return f"sizes read off the shapes{said}; assumed to be {whose}: {', '.join(assumed)}"


def interp_scale(pos_embed: Float[np.ndarray, "1 t d"]) -> float | None:
    """Finds the pos_interp_scale that a position embedding (1, t, d) was made with; None if none.

    The last column's angles are (grid - 1) / scale times each frequency: taken from the lowest
    frequency, which never wraps, up to the highest, which is the most exact.
    """
    grid, dim = math.isqrt(pos_embed.shape[1]), pos_embed.shape[-1]
    table = np.asarray(pos_embed[0], np.float32)
    if grid == 1:
        return 1.0
    if not np.isfinite(table).all():
        return None
    half = dim // 4
    frequencies = 1.0 / 10000 ** (np.arange(half) / half)
    last = table[grid - 1].astype(np.float64)  # row 0, last column
    position = 0.0
    for i in reversed(range(half)):
        angle = math.atan2(last[i], last[half + i])
        turns = round((position * frequencies[i] - angle) / (2 * math.pi))
        position = (angle + 2 * math.pi * turns) / frequencies[i]
    if position <= 0:
        return None
    exact = (grid - 1) / position
    # The nearest simple number that gives the very table.
    guesses = [float(Fraction(exact).limit_denominator(n)) for n in (1, 2, 4, 8, 16, 64, 1000)]
    for scale in [*guesses, exact]:
        if scale > 0:
            error = np.abs(sincos_pos_embed(dim, grid, scale) - table).max()
            if error <= 4 * float(ml_dtypes.finfo(pos_embed.dtype).eps):
                return scale
    return None


def _blocks(shapes: Mapping[str, tuple], prefix: str, dim: int) -> list[dict[str, int]]:
    """Reads each block's width, attention width, feed-forward width and experts (0: dense)."""
    blocks = []
    for i in range(count_blocks(shapes, prefix)):
        names = {n: shapes[f"{prefix}.{i}.{n}"] for n in BLOCK if f"{prefix}.{i}.{n}" in shapes}
        sizes = {size: n for name, shape in names.items() for size, n in BLOCK[name](shape)}
        if 0 in sizes.values():
            raise UserError(
                f"expected tensors of some size in {prefix}.{i}, found an empty one; {OTHER_KIND}"
            )
        width = sizes.get("dim", dim)
        blocks.append({"dim": width, "attn": width, "ffn": 0, "experts": 0} | sizes)
    return blocks


# Sizes that each tensor of a block tells; several tell the same one, so that one may be missing.
BLOCK: dict[str, Callable[[tuple], Iterable[tuple[str, int]]]] = {
    "norm1.weight": lambda s: [("dim", s[0])],
    "attn.proj.weight": lambda s: [("dim", s[0]), ("attn", s[1])],
    "attn.qkv.weight": lambda s: [("dim", s[1]), ("attn", s[0] // 3)],
    "mlp.w3.weight": lambda s: [("ffn", s[1])],
    "mlp.w1.weight": lambda s: [("ffn", s[0])],
    "mlp.w2": lambda s: [("experts", s[0]), ("ffn", s[1])],
    "mlp.w1": lambda s: [("experts", s[0]), ("ffn", s[2])],
}


def _every(backbone: list[dict], mixer: list[dict]) -> int:
    """Finds experts_every_n from which of the blocks have experts."""
    found = [bool(b["experts"]) for b in backbone], [bool(b["experts"]) for b in mixer]
    depths = len(backbone), len(mixer)
    for n in range(1, max(depths) + 2):
        every = [(i + 1) % n == 0 and i < depths[0] - 1 for i in range(depths[0])]
        if (every, [(i + 1) % n == 0 and i > 0 for i in range(depths[1])]) == found:
            return n
    where = [[i for i, is_moe in enumerate(kind) if is_moe] for kind in found]
    raise UserError(
        "expected experts in every n-th block (not in the backbone's last), found them in blocks "
        f"{where[0]} and patch_mixer {where[1]}; no config gives this"
    )


def _share_that_fits(shapes: Mapping[str, tuple], config: DiTConfig) -> float:
    """Returns the share of a config's tensors that the file has in their shapes."""
    table = rename_table(config)
    return sum(shapes.get(e.torch_name) == e.torch_shape for e in table) / len(table)


def _custom(shapes, dim, backbone, mixer, head_dim, common) -> DiTConfig:
    mixer_dim = mixer[0]["dim"] if mixer else dim
    halves = [b["attn"] // 2 for b in backbone + mixer if b["attn"] != b["dim"]]
    largest = math.gcd(dim, mixer_dim, *halves)
    if head_dim is None and largest > LARGEST_HEAD:
        raise UserError(
            f"expected widths that tell the head's, found only that it divides {largest}; "
            "convert it first: python -m convert --head_dim=..."
        )
    if head_dim is not None and largest % head_dim:
        raise UserError(f"expected a head_dim that divides {largest}, found {head_dim}; correct it")
    caption_ffn = shapes.get("y_emb_preprocess.mlp.w1.weight", (0,))[0]
    common_factor = math.gcd(caption_ffn, *(b["ffn"] for b in backbone + mixer))
    factors = [m for m in range(common_factor, 0, -1) if common_factor % m == 0]
    for multiple in [256] * (256 in factors) + factors:
        ratio = _mixer_ratio(mixer, multiple)
        if ratio and round_up(int(2 * int(4.0 * dim) / 3), multiple) == caption_ffn:
            break
    else:
        widths = sorted({b["ffn"] for b in backbone + mixer})
        raise UserError(
            f"expected feed-forward widths that one config gives, found {caption_ffn} in "
            f"y_emb_preprocess, {widths} in the blocks; convert it first: "
            "python -m convert --config=FILE.json"
        )
    mixer_attn = {b["attn"] for b in mixer} or {mixer_dim}
    if len(mixer_attn) > 1:
        raise UserError(f"expected one attention width in the mixer, found {sorted(mixer_attn)}")
    return DiTConfig(
        dim=dim,
        depth=len(backbone),
        head_dim=head_dim or largest,
        multiple_of=multiple,
        qkv_multipliers=[b["attn"] / b["dim"] for b in backbone],
        ffn_multipliers=[_ratio(_inner(b), b["dim"]) for b in backbone],
        use_patch_mixer=bool(mixer),
        patch_mixer_depth=len(mixer),
        patch_mixer_dim=mixer_dim,
        patch_mixer_qkv_ratio=mixer_attn.pop() / mixer_dim,
        patch_mixer_mlp_ratio=ratio,
        use_bias="blocks.0.attn.qkv.bias" in shapes,
        **common,
    )


def _inner(block: dict[str, int]) -> int:
    """Finds int(d * ratio) from a feed-forward width: SwiGLU takes two thirds of it."""
    return block["ffn"] if block["experts"] else math.ceil(1.5 * block["ffn"])


def _ratio(inner: int, dim: int) -> float:
    """Returns a ratio with int(dim * ratio) == inner."""
    ratio = inner / dim
    return ratio if int(dim * ratio) == inner else math.nextafter(ratio, math.inf)


def _mixer_ratio(mixer: list[dict], multiple: int) -> float | None:
    """Finds the mlp_ratio that gives all mixer blocks' widths, dense and experts; None if none."""
    if not mixer:
        return 4.0
    highest = max(_inner(b) for b in mixer)
    for inner in range(highest, max(highest - 2 * multiple, 0), -1):
        dense, moe = round_up(int(2 * inner / 3), multiple), round_up(inner, multiple)
        if all(b["ffn"] == (moe if b["experts"] else dense) for b in mixer):
            return _ratio(inner, mixer[0]["dim"])
    return None
