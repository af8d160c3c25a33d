"""CLIP's image tower: the vision transformer of OpenCLIP's ViT-B/32, L/14 and H/14.

Radford et al. 2021 (CLIP), section 2.4. Alphabet: n batch, l tokens (a class token and the
patches), d width.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8
from PIL import Image

from microdit_jax.encoders.clip_block import Block, TowerConfig, norm
from microdit_jax.errors import UserError

RESIZES = ("shortest", "squash")


@dataclasses.dataclass(frozen=True)
class ClipImageConfig(TowerConfig):
    """Sizes of an image tower and its image preparation; the defaults are ViT-H/14's.

    Attributes:
      image_size: pixels of a side.
      patch_size: pixels of a patch's side.
      mean, std: of each colour in [0, 1], to normalise images by.
      resize: "shortest" scales the shorter side and crops the centre, "squash" scales both sides.
    """

    width: int = 1280
    layers: int = 32
    image_size: int = 224
    patch_size: int = 14
    mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073)
    std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)
    resize: str = "shortest"

    def __post_init__(self):
        super().__post_init__()
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise UserError(f"expected {name} of three colours, found {getattr(self, name)}")
        if self.image_size < self.patch_size or self.patch_size < 1:
            raise UserError(
                f"image_size must be at least patch_size, found {self.image_size} and "
                f"{self.patch_size}"
            )
        if self.resize not in RESIZES:
            raise UserError(f"resize must be one of {', '.join(RESIZES)}, found {self.resize!r}")

    @property
    def tokens(self) -> int:
        """Number of tokens: the class token and one for each whole patch."""
        return (self.image_size // self.patch_size) ** 2 + 1


class ClipImage(nn.Module):
    """Maps pixels (n, side, side, 3) of `to_pixels` to ln_post of the class token (n, d)."""

    config: ClipImageConfig

    @nn.compact
    def __call__(self, pixels: Float32[Array, "n H W 3"]) -> Float32[Array, "n d"]:
        cfg = self.config
        size, init = (cfg.patch_size, cfg.patch_size), nn.initializers.normal(cfg.width**-0.5)
        patches = nn.Conv(
            cfg.width, size, size, "VALID", use_bias=False, dtype=cfg.dtype,
            param_dtype=cfg.param_dtype, name="conv1",
        )(pixels)  # fmt: skip
        n = len(pixels)
        patches = patches.reshape(n, -1, cfg.width).astype(jnp.float32)  # n h w d -> n (h w) d
        first = self.param("class_embedding", init, (cfg.width,), cfg.param_dtype)
        position = self.param(
            "positional_embedding", init, (cfg.tokens, cfg.width), cfg.param_dtype
        )
        first = jnp.broadcast_to(first.astype(jnp.float32), (n, 1, cfg.width))
        x = jnp.concatenate([first, patches], axis=1)  # n l d
        x = x + jnp.broadcast_to(position.astype(jnp.float32), x.shape)
        x = norm(cfg, "ln_pre")(x)
        for i in range(cfg.layers):
            x = Block(cfg, causal=False, name=f"resblocks_{i}")(x)
        return norm(cfg, "ln_post")(x[:, 0])


def to_pixels(
    images: Iterable[UInt8[np.ndarray, "_ _ 3"]], config: ClipImageConfig
) -> Float32[np.ndarray, "n {config.image_size} {config.image_size} 3"]:
    """Prepares images of any size: Pillow's bicubic resize, centre crop, normalisation."""
    mean, std = (np.asarray(value, np.float32) for value in (config.mean, config.std))

    def one(image):
        resized = np.asarray(_resize(Image.fromarray(image), config))
        return (resized.astype(np.float32) / np.float32(255) - mean[None, None]) / std[None, None]

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(one, images)))


def _resize(image: Image.Image, config: ClipImageConfig) -> Image.Image:
    side = config.image_size
    if config.resize == "squash":
        return image.resize((side, side), Image.Resampling.BICUBIC)
    short = min(image.size)
    width, height = (int(side * length / short) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)  # torchvision's CenterCrop
    return image.crop((left, top, left + side, top + side))
