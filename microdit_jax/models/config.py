"""The network's sizes under the reference's names, and the two sizes of the paper."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from microdit_jax.errors import UserError
from microdit_jax.machine.placement import round_up
from microdit_jax.models import attention, matmuls, moe
from microdit_jax.models.attention import AttentionOptions
from microdit_jax.models.layers import Precision

# A block keeps for its backward pass: everything; nothing but its input; or the results of its
# weight matrices.
REMAT_POLICIES = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": matmuls.keeps_results,
}
CAPTION_MLP_RATIO = 4.0  # of the caption block's feed-forward: fixed in the reference's code
POSITIVE = (
    "input_size", "patch_size", "in_channels", "dim", "depth", "head_dim", "multiple_of",
    "caption_channels", "pos_interp_scale", "num_experts", "expert_capacity", "experts_every_n",
    "patch_mixer_dim",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """The sizes in which the blocks of one network differ."""

    qkv_ratio: float
    mlp_ratio: float
    is_moe: bool


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The network's sizes, under the reference's names and defaults, and how it is computed.

    Attributes:
      input_size: side of the latent image; 32 for 256 px, 64 for 512 px.
      patch_size: side p of a patch.
      in_channels: latent channels, in and out.
      dim: width d of the backbone.
      depth: blocks of the backbone.
      head_dim: width c of an attention head.
      multiple_of: feed-forward widths are rounded up to a multiple of this.
      caption_channels: width of the caption embeddings.
      pos_interp_scale: position coordinates are divided by this; 2 at 512 px.
      norm_eps: epsilon of every layer norm.
      depth_init: output projections start smaller in later blocks.
      qkv_multipliers: self-attention's hidden width over d, one for each block, or for each of
        several equal runs of blocks.
      ffn_multipliers: the same for the feed-forward's hidden width.
      use_patch_mixer: whether a mixer sees all patches before masking.
      patch_mixer_depth, patch_mixer_dim, patch_mixer_qkv_ratio, patch_mixer_mlp_ratio: its sizes.
      use_bias: biases in attention and dense feed-forwards.
      num_experts: experts of a mixture-of-experts feed-forward.
      expert_capacity: how many experts take a token, on average.
      experts_every_n: every n-th block has experts, never the backbone's last.
      unmasked_blocks: so many of the backbone's last blocks see all patches, and all have a loss:
        those that a mask drops are routed past the other blocks. 0 is the paper's masking. The
        weights are the same, and so is what they compute of all patches.
      dtype: type of the matmuls and attention; norms, softmax and routing stay float32.
      param_dtype: type the parameters are stored in.
      attention: kernel, one of "xla", "looped" (CPUs), "cudnn" (NVIDIA, 16-bit) and "splash" (TPU).
      moe_dispatch: "gather" moves rows, "onehot" multiplies by one-hot matrices; equal results.
      remat: what the backward pass recomputes: "none", each whole "block", or all but "dots", which
        are the results of weight matrices and of fused attention kernels.
      residual: type of the residual stream between branches: "float32", "bfloat16", or "auto",
        which is bfloat16 where the matmuls are. It saves memory traffic. Sums are computed in
        float32, and the caption's own stream, which every block reads, stays float32.
      residual_gradient: the same of the stream's gradient; bfloat16 where the stream is.
      init_std: standard deviation of the normal initialisations. The paper's 0.02 suits a width of
        1024. At width 128 three such layers in a row make captions 20 times fainter than there, and
        the network follows them late: give small ones about 0.7 / sqrt(dim).
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    dim: int = 1152
    depth: int = 28
    head_dim: int = 64
    multiple_of: int = 256
    caption_channels: int = 1024
    pos_interp_scale: float = 1.0
    norm_eps: float = 1e-6
    depth_init: bool = True
    qkv_multipliers: Sequence[float] = (1.0,)
    ffn_multipliers: Sequence[float] = (4.0,)
    use_patch_mixer: bool = True
    patch_mixer_depth: int = 4
    patch_mixer_dim: int = 512
    patch_mixer_qkv_ratio: float = 1.0
    patch_mixer_mlp_ratio: float = 1.0
    use_bias: bool = True
    num_experts: int = 8
    expert_capacity: float = 1.0
    experts_every_n: int = 2
    unmasked_blocks: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "xla"
    moe_dispatch: str = "gather"
    remat: str = "none"
    residual: str = "auto"
    residual_gradient: str = "auto"
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("qkv_multipliers", "ffn_multipliers"):
            object.__setattr__(self, name, tuple(float(r) for r in getattr(self, name)))
        choices = {
            "dtype": ("float32", "bfloat16", "float16"),
            "param_dtype": ("float32", "bfloat16"),
            "attention": tuple(attention.IMPLEMENTATIONS),
            "moe_dispatch": tuple(moe.DISPATCHES),
            "remat": tuple(REMAT_POLICIES),
            "residual": ("auto", "float32", "bfloat16"),
            "residual_gradient": ("auto", "float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}"
                )
        for name in POSITIVE:
            if not getattr(self, name) > 0:  # nor NaN
                raise UserError(f"{name} must be above 0, found {getattr(self, name)!r}")
        splits = len(self.ffn_multipliers)
        widths = [self.dim] + [self.patch_mixer_dim] * self.use_patch_mixer
        for holds, expected in (
            (self.input_size % self.patch_size == 0, "input_size a multiple of patch_size"),
            (self.dim % 4 == 0, "dim a multiple of 4, for the position embedding"),
            (all(w % self.head_dim == 0 for w in widths), "widths that are multiples of head_dim"),
            (len(self.qkv_multipliers) == splits, "as many qkv_ as ffn_multipliers"),
            (splits and self.depth % splits == 0, "a depth divisible by the count of multipliers"),
            (0 <= self.unmasked_blocks < self.depth, "unmasked_blocks from 0 to below depth"),
            (self.expert_capacity <= self.num_experts, "expert_capacity of at most num_experts"),
        ):
            if not holds:
                raise UserError(f"DiTConfig expects {expected}, found {self}")

    @property
    def grid(self) -> int:
        """Tokens along one side of the image."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Image tokens t."""
        return self.grid**2

    @property
    def mixer_projects(self) -> bool:
        """True if tokens are projected into and out of a width of the mixer's own."""
        return self.use_patch_mixer and self.patch_mixer_dim != self.dim

    @property
    def residual_dtype(self) -> str:
        """Type of the residual stream between branches."""
        if self.residual != "auto":
            return self.residual
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    @property
    def residual_gradient_dtype(self) -> str:
        """Type of the residual stream's gradient between branches."""
        if "bfloat16" in (self.residual_dtype, self.residual_gradient):
            return "bfloat16"
        narrow = self.residual_gradient == "auto" and self.dtype == "bfloat16"
        return "bfloat16" if narrow else "float32"

    @property
    def precision(self) -> Precision:
        """Types of the token path."""
        return Precision(self.dtype, self.param_dtype)

    @property
    def attention_options(self) -> AttentionOptions:
        """Options that all attention layers share."""
        return AttentionOptions(
            head_dim=self.head_dim,
            use_bias=self.use_bias,
            eps=self.norm_eps,
            implementation=self.attention,
            init_std=self.init_std,
            precision=self.precision,
        )

    def backbone_tokens(self, kept: int) -> list[int]:
        """Tokens of an image in each of the backbone's blocks, where a mask keeps this many."""
        whole = self.unmasked_blocks
        return [kept] * (self.depth - whole) + [self.num_tokens] * whole

    def attention_width(self, d: int, qkv_ratio: float) -> int:
        """Hidden width h * c of self-attention in a block of width d."""
        return d if qkv_ratio == 1 else round_up(int(d * qkv_ratio), 2 * self.head_dim)

    def ffn_width(self, d: int, mlp_ratio: float) -> int:
        """Hidden width f of a dense feed-forward in a block of width d."""
        return round_up(int(2 * int(d * mlp_ratio) / 3), self.multiple_of)

    def expert_width(self, d: int, mlp_ratio: float) -> int:
        """Hidden width f of an expert in a block of width d."""
        return round_up(int(d * mlp_ratio), self.multiple_of)

    def mixer_blocks(self) -> list[BlockShape]:
        """The mixer's blocks: experts in every n-th, from the second on."""
        return [
            BlockShape(
                self.patch_mixer_qkv_ratio,
                self.patch_mixer_mlp_ratio,
                i > 0 and (i + 1) % self.experts_every_n == 0,
            )
            for i in range(self.patch_mixer_depth if self.use_patch_mixer else 0)
        ]

    def backbone_blocks(self) -> list[BlockShape]:
        """The backbone's blocks: experts in every n-th, but never in the last."""
        run = self.depth // len(self.ffn_multipliers)
        return [
            BlockShape(
                self.qkv_multipliers[i // run],
                self.ffn_multipliers[i // run],
                i < self.depth - 1 and (i + 1) % self.experts_every_n == 0,
            )
            for i in range(self.depth)
        ]


def for_this_machine(config: DiTConfig) -> DiTConfig:
    """The config with the fastest attention of equal results on the machine that runs this.

    A config that names a kernel other than "xla" keeps it, except for "looped", which only CPUs
    should run. Measured: docs/notebook.md. Not for programs compiled for another machine.
    """
    on_cpu = jax.default_backend() == "cpu"
    fastest = {"xla": "looped"} if on_cpu else {"looped": "xla"}
    kernel = fastest.get(config.attention, config.attention)
    return dataclasses.replace(config, attention=kernel)


def _micro_dit(
    depth: int,
    sizes: dict[str, Any],
    qkv_ratio: Sequence[float],
    mlp_ratio: Sequence[float],
    options: dict[str, Any],
) -> DiTConfig:
    """A published size: ratios that grow linearly over the depth, no biases."""
    depth = options.get("depth", depth)
    first_qkv, last_qkv = qkv_ratio
    first_mlp, last_mlp = mlp_ratio
    shared = {
        "depth": depth,
        "qkv_multipliers": np.linspace(first_qkv, last_qkv, num=max(depth, 0)).tolist(),
        "ffn_multipliers": np.linspace(first_mlp, last_mlp, num=max(depth, 0)).tolist(),
        "patch_mixer_mlp_ratio": 4.0,
        "use_bias": False,
        "expert_capacity": 2.0,
    }
    return DiTConfig(**shared | sizes | options)


def MicroDiT_XL_2(  # noqa: N802  (the reference's name)
    qkv_ratio: Sequence[float] = (0.5, 1.0),
    mlp_ratio: Sequence[float] = (0.5, 4.0),
    **options: Any,
) -> DiTConfig:
    """The 1.16 B parameter network of the paper; options are DiTConfig's fields."""
    sizes = {"dim": 1024, "head_dim": 64, "patch_mixer_depth": 6, "patch_mixer_dim": 768}
    return _micro_dit(28, sizes, qkv_ratio, mlp_ratio, options)


def MicroDiT_Tiny_2(  # noqa: N802
    qkv_ratio: Sequence[float] = (0.5, 1.0),
    mlp_ratio: Sequence[float] = (0.5, 4.0),
    **options: Any,
) -> DiTConfig:
    """The 201 M parameter network of the paper's ablations; options are DiTConfig's fields."""
    sizes = {"dim": 512, "head_dim": 32, "patch_mixer_depth": 4, "patch_mixer_dim": 512}
    return _micro_dit(16, sizes, qkv_ratio, mlp_ratio, options)


# The published architectures, by the reference's names; the first is the default everywhere.
ARCHES: dict[str, Callable[..., DiTConfig]] = {
    "MicroDiT_XL_2": MicroDiT_XL_2,
    "MicroDiT_Tiny_2": MicroDiT_Tiny_2,
}
# Short name, as commands and config variants take it -> the reference's name.
SHORT_ARCHES = {name.removeprefix("MicroDiT_"): name for name in ARCHES}


def arch_of(dim: int, depth: int, patch_mixer_dim: int | None = None) -> str | None:
    """Name of the published architecture of these sizes, or None.

    Args:
      patch_mixer_dim: None for any.
    """
    for name, arch in ARCHES.items():
        known = arch()
        wanted = known.patch_mixer_dim if patch_mixer_dim is None else patch_mixer_dim
        if (known.dim, known.depth, known.patch_mixer_dim) == (dim, depth, wanted):
            return name
    return None
