"""MicroDiT: the diffusion transformer with a patch mixer, deferred masking and experts."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from microdit_jax.errors import UserError
from microdit_jax.models import masking, moe
from microdit_jax.models.attention import CrossAttention, KeysValues, SelfAttention
from microdit_jax.models.config import (
    REMAT_POLICIES,
    BlockShape,
    DiTConfig,
    MicroDiT_Tiny_2,
    MicroDiT_XL_2,
    for_this_machine,
)
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

__all__ = [
    "Caption",
    "DiT",
    "DiTBlock",
    "DiTConfig",
    "MicroDiT_Tiny_2",
    "MicroDiT_XL_2",
    "cast_matrices",
    "for_this_machine",
]

# Modules that multiply in float32 whatever the config's type; `cast_matrices` spares them.
FLOAT32_MODULES = ("t_embedder", "pooled_y_emb_process", "adaLN_modulation_1", "gate")


def cast_matrices(params: Any, config: DiTConfig) -> Any:
    """Matrices in the type that the network multiplies them in, as it would cast them itself.

    Before weights travel between devices this halves the bytes and changes no result. Vectors stay.
    """

    def cast(path, leaf):
        spared = any(key.key in FLOAT32_MODULES for key in path)
        return leaf if spared or leaf.ndim < 2 else leaf.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


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
            init_std=cfg.init_std,
            out_init=zeros,
            name="attn",
            **kinds,
        )
        hidden_init = small_normal(cfg.init_std)
        mlp = FeedForward(
            4.0,
            cfg.multiple_of,
            cfg.use_bias,
            cfg.init_std,
            hidden_init,
            zeros,
            name="mlp",
            **kinds,
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
            "init_std": cfg.init_std,
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
                cfg.init_std,
                self.out_init,
                cfg.moe_dispatch,
                **kinds,
            )
        else:
            self.mlp = FeedForward(
                shape.mlp_ratio,
                cfg.multiple_of,
                cfg.use_bias,
                cfg.init_std,
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
        self.t_embedder = TimestepEmbedder(cfg.dim, cfg.init_std, param_dtype=cfg.param_dtype)
        self.y_embedder = CaptionProjection(cfg.dim, init_std=cfg.init_std, **norm)
        self.y_emb_preprocess = CaptionBlock(cfg)
        self.pooled_y_emb_process = Mlp(cfg.dim, init_std=cfg.init_std, **plain_norm)
        block = DiTBlock
        if cfg.remat != "none":
            block = nn.remat(DiTBlock, policy=REMAT_POLICIES[cfg.remat], methods=["__call__"])
        mixer_std = cfg.init_std / math.sqrt(2 * cfg.depth)
        self.patch_mixer = [
            block(cfg, cfg.patch_mixer_dim, shape, small_normal(mixer_std))
            for shape in cfg.mixer_blocks()
        ]
        self.blocks = [
            block(
                cfg,
                cfg.dim,
                shape,
                small_normal(
                    cfg.init_std / math.sqrt(2 * (i + 1 if cfg.depth_init else cfg.depth))
                ),
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
