"""MicroDiT: the diffusion transformer with a patch mixer, deferred masking and experts."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from microdit_jax.errors import UserError
from microdit_jax.models import attention, masking, moe
from microdit_jax.models.activations import gelu_tanh
from microdit_jax.models.attention import CrossAttention, KeysValues, SelfAttention
from microdit_jax.models.config import (
    CAPTION_MLP_RATIO,
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
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    linear,
    residual_sum,
    sincos_pos_embed,
    small_normal,
    unpatchify,
    zeros,
)
from microdit_jax.models.weights import cast_matrices

__all__ = [
    "Caption",
    "DiT",
    "DiTBlock",
    "DiTConfig",
    "MicroDiT_Tiny_2",
    "MicroDiT_XL_2",
    "abstract_params",
    "cast_matrices",
    "for_this_machine",
    "init_params",
]


def init_params(config: DiTConfig, key: PRNGKeyArray) -> Any:
    """The parameters before training, a nested dict of arrays. Pure: jit it."""
    x = jnp.zeros((1, config.input_size, config.input_size, config.in_channels), jnp.float32)
    y = jnp.zeros((1, 1, config.caption_channels), jnp.float32)
    return DiT(config).init(key, x, jnp.zeros(1, jnp.float32), y)["params"]


def abstract_params(config: DiTConfig) -> Any:
    """Shapes and types of the parameters, a nested dict of `jax.ShapeDtypeStruct`.

    `sharding.with_shardings` says on which devices they lie.
    """
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


class CaptionBlock(nn.Module):
    """A plain pre-norm transformer block over caption tokens; its branches start at zero."""

    config: DiTConfig

    @nn.compact
    def __call__(self, y: Float[Array, "n l d"]) -> Float[Array, "n l d"]:
        cfg, d = self.config, self.config.dim
        attn = SelfAttention(cfg.attention_options, hidden=d, dim=d, out_init=zeros, name="attn")
        mlp = FeedForward(
            hidden=cfg.ffn_width(d, CAPTION_MLP_RATIO),
            use_bias=cfg.use_bias,
            init_std=cfg.init_std,
            hidden_init=small_normal(cfg.init_std),
            out_init=zeros,
            precision=cfg.precision,
            name="mlp",
        )
        norm1 = LayerNorm(cfg.norm_eps, cfg.precision, name="norm1")
        norm2 = LayerNorm(cfg.norm_eps, cfg.precision, name="norm2")
        y = residual_sum(y, attn(norm1(y)))
        return residual_sum(y, mlp(norm2(y)))


class DiTBlock(nn.Module):
    """Modulated self-attention, cross-attention, modulated feed-forward (dense or experts).

    Attributes:
      dim: width d of the block.
      out_init: initialiser of the projections that end a branch.
    """

    config: DiTConfig
    dim: int
    shape: BlockShape
    out_init: Initializer

    def setup(self):
        cfg, d, shape = self.config, self.dim, self.shape
        self.norm1 = LayerNorm(cfg.norm_eps, cfg.precision)
        self.norm2 = LayerNorm(cfg.norm_eps, cfg.precision)
        self.norm3 = LayerNorm(cfg.norm_eps, cfg.precision)
        hidden, options = cfg.attention_width(d, shape.qkv_ratio), cfg.attention_options
        self.attn = SelfAttention(options, hidden=hidden, dim=d, out_init=self.out_init)
        self.cross_attn = CrossAttention(options, hidden=d, dim=d, out_init=self.out_init)
        self.adaLN_modulation_1 = linear(6 * d, cfg.precision.in_float32(), kernel_init=zeros)
        if shape.is_moe:
            self.mlp = moe.ExpertChoiceFeedForward(
                num_experts=cfg.num_experts,
                capacity=cfg.expert_capacity,
                hidden=cfg.expert_width(d, shape.mlp_ratio),
                init_std=cfg.init_std,
                out_init=self.out_init,
                dispatch=cfg.moe_dispatch,
                precision=cfg.precision,
            )
        else:
            self.mlp = FeedForward(
                hidden=cfg.ffn_width(d, shape.mlp_ratio),
                use_bias=cfg.use_bias,
                init_std=cfg.init_std,
                hidden_init=self.out_init,
                out_init=self.out_init,
                precision=cfg.precision,
            )

    def keys_values(self, y: Float[Array, "n l d_y"]) -> KeysValues:
        """The caption's keys and values for cross-attention; equal at every noise level."""
        return self.cross_attn.keys_values(y)

    def __call__(
        self,
        x: Float[Array, "n t d"],
        y: Float[Array, "n l d_y"],
        c: Float[Array, "n d_c"],
        keys_values: KeysValues | None = None,
        lengths: Int[Array, " n"] | None = None,
        modulation: Float[Array, "n six_d"] | None = None,
    ) -> Float[Array, "n t d"]:
        all_six = self.adaLN_modulation_1(gelu_tanh(c)) if modulation is None else modulation
        parts = jnp.split(all_six, 6, axis=-1)  # each (n, d)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        keys_values = self.keys_values(y) if keys_values is None else keys_values
        narrow = self.config.residual_gradient_dtype
        x, h = self.norm1.beside_stream(x, shift_msa, scale_msa, gradient_dtype=narrow)
        x = residual_sum(x, self.attn(h), gate_msa)
        if self.config.dtype == "float32":  # samples stay what they were to the bit
            x, h = self.norm2.beside_stream(x, gradient_dtype=narrow)
            x = residual_sum(x, self.cross_attn(h, keys_values, lengths))
        else:  # as rows of a matrix, to which the projection's matmul can add its own
            rows = x.reshape(-1, self.dim)  # (n * t, d)
            rows, h, scale = self.norm2.before_matrix(rows, gradient_dtype=narrow)
            h = self.cross_attn(h.reshape(x.shape), keys_values, lengths, scale)
            x = residual_sum(rows, h.reshape(rows.shape)).reshape(x.shape)
        x, h = self.norm3.beside_stream(x, shift_mlp, scale_mlp, gradient_dtype=narrow)
        return residual_sum(x, self.mlp(h), gate_mlp)


class Caption(NamedTuple):
    """All that the network needs of a caption; a function of the caption alone.

    Attributes:
      tokens: for the backbone.
      mixer_tokens: for the mixer.
      pooled: their processed mean.
      keys_values: for every block in turn, or None where each block computes its own.
      lengths: the tokens that are no padding of the attention kernel's; None: all.
    """

    tokens: Float[Array, "n l d"]
    mixer_tokens: Float[Array, "n l d_mixer"]
    pooled: Float[Array, "n d"]
    keys_values: tuple[KeysValues, ...] | None
    lengths: Int[Array, " n"] | None


class DiT(nn.Module):
    """The raw network F of EDM (arXiv 2407.15811, section 3).

    Attributes:
      enter: None, or called before each block with its name, its weights as the network was given
        them, its input and c; returns weights, input and modulation, or None, to compute with.
    """

    config: DiTConfig
    enter: Callable[[str, Any, Array, Array], tuple[Any, Array, Array | None]] | None = None

    def setup(self):
        cfg = self.config
        eps, init_std, precision = cfg.norm_eps, cfg.init_std, cfg.precision
        # One vector per image steers every token: float32 costs nothing here and keeps the error of
        # 16-bit types to that of the token path.
        in_float32 = precision.in_float32()
        self.x_embedder = PatchEmbed(cfg.dim, cfg.patch_size, precision)
        self.t_embedder = TimestepEmbedder(cfg.dim, init_std, in_float32)
        self.y_embedder = CaptionProjection(cfg.dim, eps, init_std, precision)
        self.y_emb_preprocess = CaptionBlock(cfg)
        self.pooled_y_emb_process = Mlp(cfg.dim, eps, init_std, in_float32)
        block = DiTBlock
        if cfg.remat != "none":
            block = nn.remat(DiTBlock, policy=REMAT_POLICIES[cfg.remat], methods=["__call__"])
        mixer_init = small_normal(init_std / math.sqrt(2 * cfg.depth))
        self.patch_mixer = [
            block(cfg, cfg.patch_mixer_dim, shape, mixer_init) for shape in cfg.mixer_blocks()
        ]
        depths = [i + 1 if cfg.depth_init else cfg.depth for i in range(cfg.depth)]
        self.blocks = [
            block(cfg, cfg.dim, shape, small_normal(init_std / math.sqrt(2 * depth)))
            for depth, shape in zip(depths, cfg.backbone_blocks(), strict=True)
        ]
        if cfg.mixer_projects:
            d_mixer, use_bias = cfg.patch_mixer_dim, cfg.use_bias
            self.patch_mixer_map_xin_0 = LayerNorm(eps, precision)
            self.patch_mixer_map_xin_1 = linear(d_mixer, precision, use_bias=use_bias)
            self.patch_mixer_map_y_0 = LayerNorm(eps, precision)
            self.patch_mixer_map_y_1 = linear(d_mixer, precision, use_bias=use_bias)
            self.patch_mixer_map_xout_0 = LayerNorm(eps, precision)
            self.patch_mixer_map_xout_1 = linear(cfg.dim, precision, use_bias=use_bias)
        self.final_layer = FinalLayer(cfg.patch_size**2 * cfg.in_channels, eps, precision)

    def encode_caption(
        self, y: Float[Array, "n l caption"], *, keys_values: bool = True
    ) -> Caption:
        """Computes all that depends on the caption alone: once per prompt, when sampling.

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
        # Every block reads the caption, so its residual stream is not rounded between branches.
        y = self.y_embedder(jnp.asarray(y, cfg.dtype)).astype(jnp.float32)  # (n, l, d)
        y = self.y_emb_preprocess(y)
        # Padding tokens count in the mean: the reference has no padding mask anywhere.
        pooled = self.pooled_y_emb_process(y.mean(axis=1))  # (n, d)
        y, lengths = attention.padded_caption(y, cfg.attention)
        y_mixer = y
        if cfg.mixer_projects:
            y_mixer = self.patch_mixer_map_y_1(self.patch_mixer_map_y_0(y))  # (n, l, d_mixer)
        ahead = None
        if keys_values:
            ahead = tuple(block.keys_values(y_mixer) for block in self.patch_mixer)
            ahead += tuple(block.keys_values(y) for block in self.blocks)
        # The blocks would round them themselves, each its own.
        y, y_mixer = y.astype(cfg.dtype), y_mixer.astype(cfg.dtype)
        return Caption(y, y_mixer, pooled, ahead, lengths)

    def _through(self, block: Any, x: Array, y: Array, c: Array, keys: Iterator, *args: Any) -> Any:
        """Runs a block on x, with the next keys and values."""
        if self.enter is None:
            return block(x, y, c, next(keys, None), *args)
        module, variables = block.unbind()
        weights, x, modulation = self.enter(str(block.name), variables["params"], x, c)
        return module.apply({"params": weights}, x, y, c, next(keys, None), *args, modulation)

    def predict(
        self,
        x: Float[Array, "n height width channels"],
        t: Float[Array, " n"],
        caption: Caption,
        *,
        mask_noise: Float[Array, "n t"] | None = None,
        mask_ratio: float = 0.0,
    ) -> tuple[Float[Array, "n height width channels"], Float[Array, "n t"] | None]:
        """F(x; t, caption) for an encoded caption; arguments and results as of `__call__`."""
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
        x = x.astype(cfg.residual_dtype)
        c = self.t_embedder(t) + caption.pooled  # (n, d)

        if cfg.mixer_projects:  # (n, t, d) -> (n, t, d_mixer)
            x = self.patch_mixer_map_xin_1(self.patch_mixer_map_xin_0(x))
            x = x.astype(cfg.residual_dtype)
        for block in self.patch_mixer:
            x = self._through(block, x, caption.mixer_tokens, c, keys_values, caption.lengths)

        # Dropped tokens that end here need no width of the backbone's; those routed past it do.
        routes = cfg.unmasked_blocks > 0
        x = routed = self._widened(x) if routes else x  # (n, t, d or d_mixer)
        mask = masking.mask_if_any(mask_noise, cfg.num_tokens, mask_ratio)
        x = x if mask is None else masking.drop_tokens(x, mask)  # (n, t_kept, ...)
        x = x if routes else self._widened(x)  # (n, t_kept, d)
        for i, block in enumerate(self.blocks):
            if i == cfg.depth - cfg.unmasked_blocks and mask is not None:
                x, mask = masking.rejoin_tokens(x, mask, routed), None  # (n, t, d)
            x = self._through(block, x, caption.tokens, c, keys_values, caption.lengths)

        x = self.final_layer(x, c)  # (n, t_kept, p * p * channels)
        if mask is not None:
            x = masking.restore_tokens(x, mask)  # (n, t, p * p * channels)
        sample = unpatchify(x, cfg.patch_size).astype(jnp.float32)
        return sample, None if mask is None else mask.dropped

    def _widened(self, x: Float[Array, "n t d_mixer"]) -> Float[Array, "n t d"]:
        """The mixer's tokens in the backbone's width."""
        if self.config.mixer_projects:
            x = self.patch_mixer_map_xout_1(self.patch_mixer_map_xout_0(x))
        return x.astype(self.config.residual_dtype)

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
          float32, 1 where dropped, or None when nothing is, or all patches are predicted anyhow.
        Raises:
          UserError: latents or captions of another shape than the config's, or a bad mask ratio.
        """
        caption = self.encode_caption(y, keys_values=False)
        return self.predict(x, t, caption, mask_noise=mask_noise, mask_ratio=mask_ratio)
