"""The image autoencoder of latent diffusion (AutoencoderKL): images to latents and back.

The network of Rombach et al. 2022 (arXiv:2112.10752, appendix G) in the layout of diffusers, whose
module names it keeps. Channels last; group norms and the softmax in float32.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from microdit_jax.errors import UserError

EPS = 1e-6  # of every group norm


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of an autoencoder; fields are named as in diffusers' config.json.

    Attributes:
      block_out_channels: width of each level, from the image inwards; each level but the last
        halves the sides.
      layers_per_block: residual blocks of an encoder's level; a decoder's has one more.
      scaling_factor: factor on latents before diffusion; the network itself does not use it.
      shift_factor: subtracted from latents before that factor (Stable Diffusion 3, Flux).
      latents_mean, latents_std: for each channel, subtracted and divided by instead.
      use_quant_conv, use_post_quant_conv: 1x1 convolutions after the encoder, before the decoder.
      dtype: type of the convolutions and matmuls, "float32" or "bfloat16".
    Raises:
      UserError: a value out of range.
    """

    block_out_channels: Sequence[int]
    latent_channels: int
    scaling_factor: float
    in_channels: int = 3
    out_channels: int = 3
    layers_per_block: int = 2
    norm_num_groups: int = 32
    shift_factor: float = 0.0
    latents_mean: Sequence[float] | None = None
    latents_std: Sequence[float] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(
                f"the VAE's dtype must be float32 or bfloat16, found {self.dtype!r}; "
                "its activations overflow in float16"
            )
        groups = self.norm_num_groups
        uneven = [width for width in self.block_out_channels if groups < 1 or width % groups]
        if uneven or not self.block_out_channels:
            raise UserError(
                f"expected block_out_channels in multiples of norm_num_groups "
                f"{self.norm_num_groups}, found {self.block_out_channels}; give the VAE's own "
                "config.json"
            )
        if not (np.isfinite(self.scaling_factor) and self.scaling_factor > 0):
            raise UserError(
                f"scaling_factor must be a positive number, found {self.scaling_factor}; the "
                "VAE's config.json has it"
            )
        self._check_constants()

    def _check_constants(self):
        """Raises UserError unless latents can be shifted and scaled by the constants."""
        both = (self.latents_mean is None) == (self.latents_std is None)
        for name in ("latents_mean", "latents_std"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(values))
                good = len(values) == self.latent_channels and np.isfinite(values).all()
                both = both and good and (name == "latents_mean" or min(values) > 0)
        if not both or not np.isfinite(self.shift_factor):
            raise UserError(
                f"expected a finite shift_factor, and {self.latent_channels} latents_mean with as "
                f"many positive latents_std or neither, found {self.shift_factor}, "
                f"{self.latents_mean}, {self.latents_std}; give the VAE's own config.json"
            )
        if self.shift_factor and self.latents_mean is not None:
            raise UserError(
                f"expected a shift_factor or latents_mean, found both, {self.shift_factor} and "
                f"{self.latents_mean}; this VAE is not supported"
            )

    @property
    def factor(self) -> int:
        """Pixels along a side of the image for one latent."""
        return 2 ** (len(self.block_out_channels) - 1)


class GroupNorm(nn.Module):
    """Group norm (Wu & He 2018) over height, width and a group's channels; all in float32."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "n H W d"]) -> Float[Array, "n H W d"]:
        n, _, _, d = x.shape
        scale = self.param("scale", nn.initializers.ones, (d,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (d,), jnp.float32)

        def group_mean(y):
            """(n, H, W, d) -> (n, 1, 1, d): first over pixels, then over each group's channels."""
            mean = y.mean(axis=(1, 2)).reshape(n, self.groups, d // self.groups)
            mean = jnp.broadcast_to(mean.mean(axis=-1, keepdims=True), mean.shape)
            return mean.reshape(n, 1, 1, d)

        x = x.astype(jnp.float32)
        centred = x - group_mean(x)
        factor = jax.lax.rsqrt(group_mean(jnp.square(centred)) + EPS) * scale.reshape(1, 1, 1, d)
        return centred * factor + bias.reshape(1, 1, 1, d)


def _conv(features: int, config: VaeConfig, name: str, *, size: int = 3) -> nn.Conv:
    return nn.Conv(features, (size, size), padding=size // 2, dtype=config.dtype, name=name)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))); a 1x1 convolution of x where widths differ."""

    features: int
    config: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n H W d"]) -> Float[Array, "n H W e"]:
        cfg = self.config
        h = nn.silu(GroupNorm(cfg.norm_num_groups, name="norm1")(x))
        h = _conv(self.features, cfg, "conv1")(h)
        h = nn.silu(GroupNorm(cfg.norm_num_groups, name="norm2")(h))
        h = _conv(self.features, cfg, "conv2")(h)
        if x.shape[-1] != self.features:
            x = _conv(self.features, cfg, "conv_shortcut", size=1)(x)
        return x + h


class Attention(nn.Module):
    """x + self-attention of all pixels, with a single head as wide as x."""

    config: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n H W d"]) -> Float[Array, "n H W d"]:
        n, height, width, d = x.shape
        dense = functools.partial(nn.Dense, d, dtype=self.config.dtype)
        y = GroupNorm(self.config.norm_num_groups, name="group_norm")(x)
        y = y.reshape(n, height * width, d)  # n t d
        q, k, v = (dense(name=name)(y) for name in ("to_q", "to_k", "to_v"))
        scores = jnp.einsum("ntd,nsd->nts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * d**-0.5, axis=-1).astype(v.dtype)
        y = dense(name="to_out_0")(jnp.einsum("nts,nsd->ntd", weights, v))
        return x + y.reshape(n, height, width, d)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the smallest size."""

    config: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n H W d"]) -> Float[Array, "n H W d"]:
        d = x.shape[-1]
        x = ResnetBlock(d, self.config, name="resnets_0")(x)
        x = Attention(self.config, name="attentions_0")(x)
        return ResnetBlock(d, self.config, name="resnets_1")(x)


class Downsample(nn.Module):
    """Halves both sides; one row and column of zeros at the bottom and right only."""

    config: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n H W d"]) -> Float[Array, "n h w d"]:
        padding = ((0, 1), (0, 1))
        return nn.Conv(
            x.shape[-1], (3, 3), 2, padding=padding, dtype=self.config.dtype, name="conv"
        )(x)


class Upsample(nn.Module):
    """Doubles both sides: repeats each pixel, then convolves."""

    config: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n h w d"]) -> Float[Array, "n H W d"]:
        n, h, w, d = x.shape
        x = jnp.broadcast_to(x.reshape(n, h, 1, w, 1, d), (n, h, 2, w, 2, d))
        return _conv(d, self.config, "conv")(x.reshape(n, 2 * h, 2 * w, d))


class Level(nn.Module):
    """Resnets of one width, then a change of size: "down", "up" or "" for none."""

    features: int
    layers: int
    resize: str
    config: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n H W d"]) -> Float[Array, "n h w e"]:
        for i in range(self.layers):
            x = ResnetBlock(self.features, self.config, name=f"resnets_{i}")(x)
        if self.resize == "down":
            x = Downsample(self.config, name="downsamplers_0")(x)
        elif self.resize == "up":
            x = Upsample(self.config, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    """Maps an image to mean and log variance side by side, before the quantisation convolution."""

    config: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n H W c"]) -> Float[Array, "n h w d"]:
        cfg = self.config
        widths = cfg.block_out_channels
        x = _conv(widths[0], cfg, "conv_in")(x)
        for i, width in enumerate(widths):
            resize = "down" if i < len(widths) - 1 else ""
            x = Level(width, cfg.layers_per_block, resize, cfg, name=f"down_blocks_{i}")(x)
        x = MidBlock(cfg, name="mid_block")(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, name="conv_norm_out")(x))
        return _conv(2 * cfg.latent_channels, cfg, "conv_out")(x)


class Decoder(nn.Module):
    """Maps latents, after the post-quantisation convolution, to an image."""

    config: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n H W d"]:
        cfg = self.config
        widths = cfg.block_out_channels[::-1]
        x = _conv(widths[0], cfg, "conv_in")(x)
        x = MidBlock(cfg, name="mid_block")(x)
        for i, width in enumerate(widths):
            resize = "up" if i < len(widths) - 1 else ""
            x = Level(width, cfg.layers_per_block + 1, resize, cfg, name=f"up_blocks_{i}")(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, name="conv_norm_out")(x))
        return _conv(cfg.out_channels, cfg, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """Encoder and decoder; latents here are raw, neither shifted nor scaled."""

    config: VaeConfig

    def setup(self):
        cfg = self.config
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        if cfg.use_quant_conv:
            self.quant_conv = nn.Conv(2 * cfg.latent_channels, (1, 1), dtype=cfg.dtype)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(cfg.latent_channels, (1, 1), dtype=cfg.dtype)

    def encode_moments(
        self, images: Float[Array, "n H W colours"]
    ) -> tuple[Float[Array, "n h w c"], Float[Array, "n h w c"]]:
        """Returns the normal distribution of each image's latents.

        Args:
          images: in [-1, 1]; sides must be multiples of `config.factor`.
        Returns:
          mean and log variance, clamped to [-30, 20], both (n, H/factor, W/factor, c) float32.
        Raises:
          UserError: the sides or channels do not fit.
        """
        _, height, width, channels = images.shape
        factor = self.config.factor
        if height % factor or width % factor or channels != self.config.in_channels:
            raise UserError(
                f"expected images of {self.config.in_channels} channels with sides in multiples "
                f"of {factor} pixels, found {height}x{width}x{channels}; resize them"
            )
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    def decode(self, latents: Float[Array, "n h w c"]) -> Float[Array, "n H W 3"]:
        """Decodes raw latents to images (n, h*factor, w*factor, 3) float32, about in [-1, 1].

        Raises:
          UserError: latents with another number of channels.
        """
        if latents.shape[-1] != self.config.latent_channels:
            raise UserError(
                f"expected latents of {self.config.latent_channels} channels for this VAE, found "
                f"{latents.shape[-1]}; give the VAE that the latents were made with"
            )
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: Float[Array, "n H W colours"]) -> Float[Array, "n H W 3"]:
        """Reconstructs images from the mean of their latents."""
        return self.decode(self.encode_moments(images)[0])


def sample_latents(
    mean: Float[Array, "n h w c"], logvar: Float[Array, "n h w c"], noise: Float[Array, "n h w c"]
) -> Float[Array, "n h w c"]:
    """Samples latents from the encoder's distribution with the given standard normal noise."""
    return mean + jnp.exp(0.5 * logvar) * noise
