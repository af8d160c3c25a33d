"""MicroDiT: the diffusion transformer with a patch mixer, deferred masking and experts."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from microdit_jax.errors import UserError
from microdit_jax.models import attention, masking, moe
from microdit_jax.models.attention import CrossAttention, KeysValues, SelfAttention
from microdit_jax.models.layers import (
    CaptionProjection,
    FeedForward,
    FinalLayer,
    Initializer,
    LayerNorm,
    Linear,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    gelu_tanh,
    modulate,
    round_up,
    sincos_pos_embed,
    small_normal,
    unpatchify,
    zeros,
)

# What a block keeps for its backward pass: everything; nothing but its input; or the results of
# its weight matrices.
REMAT_POLICIES = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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
      dtype: type of the matrix products and attention; the residual stream, norms, softmax and
        routing stay float32.
      param_dtype: type the parameters are stored in.
      attention: kernel, one of "xla", "cudnn" (NVIDIA, 16-bit) and "splash" (TPU).
      moe_dispatch: "gather" moves rows, "onehot" multiplies by one-hot matrices; equal results.
      remat: what the backward pass recomputes: "none", each whole "block", or all but "dots".
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
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "xla"
    moe_dispatch: str = "gather"
    remat: str = "none"

    def __post_init__(self):
        for name in ("qkv_multipliers", "ffn_multipliers"):
            object.__setattr__(self, name, tuple(float(r) for r in getattr(self, name)))
        choices = {
            "dtype": ("float32", "bfloat16", "float16"),
            "param_dtype": ("float32", "bfloat16"),
            "attention": attention.IMPLEMENTATIONS,
            "moe_dispatch": moe.DISPATCHES,
            "remat": tuple(REMAT_POLICIES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}"
                )
        splits = len(self.ffn_multipliers)
        widths = [self.dim] + [self.patch_mixer_dim] * self.use_patch_mixer
        for holds, expected in (
            (self.input_size % self.patch_size == 0, "input_size a multiple of patch_size"),
            (self.dim % 4 == 0, "dim a multiple of 4, for the position embedding"),
            (all(w % self.head_dim == 0 for w in widths), "widths that are multiples of head_dim"),
            (len(self.qkv_multipliers) == splits, "as many qkv_ as ffn_multipliers"),
            (splits and self.depth % splits == 0, "a depth divisible by the count of multipliers"),
            (self.experts_every_n >= 1, "experts_every_n of at least 1"),
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
        """Whether tokens are projected into and out of the mixer's own width."""
        return self.use_patch_mixer and self.patch_mixer_dim != self.dim

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


def _micro_dit(
    depth: int, sizes: dict, qkv_ratio: Sequence[float], mlp_ratio: Sequence[float], options: dict
) -> DiTConfig:
    """What both released sizes share: ratios that grow linearly over the depth, no biases."""
    return DiTConfig(
        depth=depth,
        qkv_multipliers=np.linspace(*qkv_ratio, num=depth).tolist(),
        ffn_multipliers=np.linspace(*mlp_ratio, num=depth).tolist(),
        patch_mixer_mlp_ratio=4.0,
        use_bias=False,
        **{"expert_capacity": 2.0} | sizes | options,
    )


def MicroDiT_XL_2(  # noqa: N802  (the reference's name)
    qkv_ratio: Sequence[float] = (0.5, 1.0), mlp_ratio: Sequence[float] = (0.5, 4.0), **options
) -> DiTConfig:
    """The 1.16 B parameter network of the paper; options are DiTConfig's fields."""
    sizes = {"dim": 1024, "head_dim": 64, "patch_mixer_depth": 6, "patch_mixer_dim": 768}
    return _micro_dit(28, sizes, qkv_ratio, mlp_ratio, options)


def MicroDiT_Tiny_2(  # noqa: N802
    qkv_ratio: Sequence[float] = (0.5, 1.0), mlp_ratio: Sequence[float] = (0.5, 4.0), **options
) -> DiTConfig:
    """The 201 M parameter network of the paper's ablations; options are DiTConfig's fields."""
    sizes = {"dim": 512, "head_dim": 32, "patch_mixer_depth": 4, "patch_mixer_dim": 512}
    return _micro_dit(16, sizes, qkv_ratio, mlp_ratio, options)


class CaptionBlock(nn.Module):
    """A plain pre-norm transformer block over caption tokens; its branches start at zero."""

    config: DiTConfig

    @nn.compact
    def __call__(self, y: Float[Array, "n l d"]) -> Float[Array, "n l d"]:
        cfg = self.config
        kinds = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        attn = SelfAttention(
            dim=cfg.dim,
            hidden=cfg.dim,
            head_dim=cfg.head_dim,
            use_bias=cfg.use_bias,
            eps=cfg.norm_eps,
            implementation=cfg.attention,
            out_init=zeros,
            name="attn",
            **kinds,
        )
        mlp = FeedForward(
            4.0, cfg.multiple_of, cfg.use_bias, small_normal(0.02), zeros, name="mlp", **kinds
        )
        y = y + attn(LayerNorm(cfg.norm_eps, cfg.param_dtype, name="norm1")(y)).astype(y.dtype)
        return y + mlp(LayerNorm(cfg.norm_eps, cfg.param_dtype, name="norm2")(y)).astype(y.dtype)


class DiTBlock(nn.Module):
    """Modulated self-attention, cross-attention, modulated feed-forward (dense or experts)."""

    config: DiTConfig
    dim: int
    shape: BlockShape
    out_init: Initializer

    def setup(self):
        cfg, d, shape = self.config, self.dim, self.shape
        kinds = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        heads = {
            "head_dim": cfg.head_dim,
            "use_bias": cfg.use_bias,
            "eps": cfg.norm_eps,
            "implementation": cfg.attention,
            "out_init": self.out_init,
        } | kinds
        hidden = d if shape.qkv_ratio == 1 else round_up(int(d * shape.qkv_ratio), 2 * cfg.head_dim)
        self.norm1 = LayerNorm(cfg.norm_eps, cfg.param_dtype)
        self.norm2 = LayerNorm(cfg.norm_eps, cfg.param_dtype)
        self.norm3 = LayerNorm(cfg.norm_eps, cfg.param_dtype)
        self.attn = SelfAttention(dim=d, hidden=hidden, **heads)
        self.cross_attn = CrossAttention(hidden=d, **heads)
        self.adaLN_modulation_1 = Linear(
            6 * d, kernel_init=zeros, dtype=jnp.float32, param_dtype=cfg.param_dtype
        )
        if shape.is_moe:
            self.mlp = moe.ExpertChoiceFeedForward(
                cfg.num_experts,
                cfg.expert_capacity,
                round_up(int(d * shape.mlp_ratio), cfg.multiple_of),
                self.out_init,
                cfg.moe_dispatch,
                **kinds,
            )
        else:
            self.mlp = FeedForward(
                shape.mlp_ratio,
                cfg.multiple_of,
                cfg.use_bias,
                self.out_init,
                self.out_init,
                **kinds,
            )

    def keys_values(self, y: Float[Array, "n l d_y"]) -> KeysValues:
        """What cross-attention needs of the caption; the same at every noise level."""
        return self.cross_attn.keys_values(y)

    def __call__(
        self,
        x: Float[Array, "n t d"],
        y: Float[Array, "n l d_y"],
        c: Float[Array, "n d_c"],
        keys_values: KeysValues | None = None,
    ) -> Float[Array, "n t d"]:
        modulation = jnp.split(self.adaLN_modulation_1(gelu_tanh(c)), 6, axis=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        if keys_values is None:
            keys_values = self.keys_values(y)
        # Each branch is computed in the config's type; the sum, x, stays float32.
        branch = self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_msa[:, None, :] * branch.astype(x.dtype)
        x = x + self.cross_attn(self.norm2(x), keys_values).astype(x.dtype)
        branch = self.mlp(modulate(self.norm3(x), shift_mlp, scale_mlp))
        return x + gate_mlp[:, None, :] * branch.astype(x.dtype)


class Caption(NamedTuple):
    """All that the network needs of a caption; a function of the caption alone.

    tokens (n, l, d) for the backbone; mixer_tokens (n, l, d_mixer) for the mixer; pooled (n, d);
    keys_values for every block in turn, or None where each block computes its own.
    """

    tokens: Float[Array, "n l d"]
    mixer_tokens: Float[Array, "n l d_mixer"]
    pooled: Float[Array, "n d"]
    keys_values: tuple[KeysValues, ...] | None


class DiT(nn.Module):
    """The raw network F of EDM (arXiv 2407.15811, section 3)."""

    config: DiTConfig

    def setup(self):
        cfg = self.config
        kinds = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        norm = {"eps": cfg.norm_eps} | kinds
        plain_norm = {"eps": cfg.norm_eps, "param_dtype": cfg.param_dtype}
        self.x_embedder = PatchEmbed(cfg.dim, cfg.patch_size, **kinds)
        # One vector per image steers every token: float32 costs nothing here and keeps the error of
        # 16-bit types to that of the token path.
        self.t_embedder = TimestepEmbedder(cfg.dim, param_dtype=cfg.param_dtype)
        self.y_embedder = CaptionProjection(cfg.dim, **norm)
        self.y_emb_preprocess = CaptionBlock(cfg)
        self.pooled_y_emb_process = Mlp(cfg.dim, **plain_norm)
        block = DiTBlock
        if cfg.remat != "none":
            block = nn.remat(DiTBlock, policy=REMAT_POLICIES[cfg.remat], methods=["__call__"])
        mixer_std = 0.02 / math.sqrt(2 * cfg.depth)
        self.patch_mixer = [
            block(cfg, cfg.patch_mixer_dim, shape, small_normal(mixer_std))
            for shape in cfg.mixer_blocks()
        ]
        self.blocks = [
            block(
                cfg,
                cfg.dim,
                shape,
                small_normal(0.02 / math.sqrt(2 * (i + 1 if cfg.depth_init else cfg.depth))),
            )
            for i, shape in enumerate(cfg.backbone_blocks())
        ]
        if cfg.mixer_projects:
            into = {"features": cfg.patch_mixer_dim, "use_bias": cfg.use_bias} | kinds
            self.patch_mixer_map_xin_0 = LayerNorm(**plain_norm)
            self.patch_mixer_map_xin_1 = Linear(**into)
            self.patch_mixer_map_y_0 = LayerNorm(**plain_norm)
            self.patch_mixer_map_y_1 = Linear(**into)
            self.patch_mixer_map_xout_0 = LayerNorm(**plain_norm)
            self.patch_mixer_map_xout_1 = Linear(**into | {"features": cfg.dim})
        self.final_layer = FinalLayer(cfg.patch_size**2 * cfg.in_channels, **norm)

    def encode_caption(
        self, y: Float[Array, "n l caption"], *, keys_values: bool = True
    ) -> Caption:
        """What depends on the caption alone; to be computed once per prompt when sampling.

        Args:
          y: caption embeddings; all zeros for a dropped caption.
          keys_values: also compute every block's cross-attention keys and values (in training that
            would only cost memory).
        """
        cfg = self.config
        if y.ndim != 3 or y.shape[-1] != cfg.caption_channels:
            raise UserError(
                f"caption embeddings must be (n, l, {cfg.caption_channels}), found {y.shape}; is "
                "this the text encoder that the model was trained with?"
            )
        y = self.y_embedder(jnp.asarray(y, cfg.dtype)).astype(jnp.float32)
        y = self.y_emb_preprocess(y)
        # Padding tokens count in the mean: the reference has no padding mask anywhere.
        pooled = self.pooled_y_emb_process(y.mean(axis=1))
        y_mixer = y
        if cfg.mixer_projects:
            y_mixer = self.patch_mixer_map_y_1(self.patch_mixer_map_y_0(y))
        ahead = None
        if keys_values:
            ahead = tuple(block.keys_values(y_mixer) for block in self.patch_mixer)
            ahead += tuple(block.keys_values(y) for block in self.blocks)
        return Caption(y, y_mixer, pooled, ahead)

    def predict(
        self,
        x: Float[Array, "n height width channels"],
        t: Float[Array, " n"],
        caption: Caption,
        *,
        mask_noise: Float[Array, "n t"] | None = None,
        mask_ratio: float = 0.0,
    ) -> tuple[Float[Array, "n height width channels"], Float[Array, "n t"] | None]:
        """F(x; t, caption) for an encoded caption; otherwise as `__call__`."""
        cfg = self.config
        expected = (cfg.input_size, cfg.input_size, cfg.in_channels)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise UserError(
                f"latents must be (n, {', '.join(map(str, expected))}), found {x.shape}; use a "
                "model of that input_size and in_channels, or the VAE this model was trained with"
            )
        keys_values = iter(caption.keys_values or ())
        x = self.x_embedder(jnp.asarray(x, cfg.dtype)).astype(jnp.float32)  # (n, t, d)
        x = x + sincos_pos_embed(cfg.dim, cfg.grid, cfg.pos_interp_scale)[None]
        c = self.t_embedder(t) + caption.pooled

        if cfg.mixer_projects:
            x = self.patch_mixer_map_xin_1(self.patch_mixer_map_xin_0(x)).astype(jnp.float32)
        for block in self.patch_mixer:
            x = block(x, caption.mixer_tokens, c, next(keys_values, None))

        mask = None
        if masking.num_kept(cfg.num_tokens, mask_ratio) < cfg.num_tokens:
            if mask_noise is None:
                raise UserError(
                    f"mask_ratio {mask_ratio} needs mask_noise (n, {cfg.num_tokens}); draw it with "
                    "microdit_jax.models.masking.draw_noise(key, n, t)"
                )
            mask = masking.make_mask(mask_noise, mask_ratio)
            x = masking.drop_tokens(x, mask)

        if cfg.mixer_projects:  # after masking, where it costs least
            x = self.patch_mixer_map_xout_1(self.patch_mixer_map_xout_0(x)).astype(jnp.float32)
        for block in self.blocks:
            x = block(x, caption.tokens, c, next(keys_values, None))

        x = self.final_layer(x, c)
        if mask is not None:
            x = masking.restore_tokens(x, mask)
        sample = unpatchify(x, cfg.patch_size).astype(jnp.float32)
        return sample, None if mask is None else mask.dropped

    def __call__(
        self,
        x: Float[Array, "n height width channels"],
        t: Float[Array, " n"],
        y: Float[Array, "n l caption"],
        *,
        mask_noise: Float[Array, "n t"] | None = None,
        mask_ratio: float = 0.0,
    ) -> tuple[Float[Array, "n height width channels"], Float[Array, "n t"] | None]:
        """Raw network output F(x; t, y).

        Args:
          x: noisy latents already scaled by c_in, channels last.
          t: c_noise = ln(sigma) / 4 of each image.
          y: caption embeddings; all zeros for a dropped caption.
          mask_noise: uniform noise that decides which tokens are dropped; needed if mask_ratio > 0.
          mask_ratio: share of tokens dropped after the mixer, in [0, 1); static.
        Returns:
          sample (n, height, width, channels) float32, zero at dropped patches, and the mask (n, t)
          float32, 1 where dropped, or None when nothing is.
        Raises:
          UserError: latents or captions of another shape than the config's, or a bad mask ratio.
        """
        caption = self.encode_caption(y, keys_values=False)
        return self.predict(x, t, caption, mask_noise=mask_noise, mask_ratio=mask_ratio)
