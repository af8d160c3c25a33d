"""The FID network: Inception-v3 as TensorFlow released it in 2015, in its PyTorch conversion.

Szegedy et al. 2016 (arXiv:1512.00567), without the auxiliary head. The released graph differs from
other Inceptions: average pooling counts no padding, the last block pools by maximum, and there are
1008 classes. Modules are named as in pt_inception-2015-12-05-6726825d.pth.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from microdit_jax.errors import UserError

WIDTH = 32  # channels of the first convolution
EPS = 1e-3  # epsilon of every batch norm


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """Sizes of the network.

    Attributes:
      classes: number of logits.
      divisor: divides every width; 1 is the public network, larger values are for tests.
    """

    classes: int = 1008
    divisor: int = 1

    def __post_init__(self):
        if self.divisor not in (1, 2, 4, 8, 16):
            raise UserError(f"divisor must be 1, 2, 4, 8 or 16, found {self.divisor}")


class Activations(NamedTuple):
    """Activations along the network; FID is computed from pool_3.

    Attributes:
      pool_1: (n, 73, 73, 64), after the first max pooling.
      pool_2: (n, 35, 35, 192), after the second.
      mixed_6e: (n, 17, 17, 768), where the auxiliary head was.
      pool_3: (n, 2048), mean over all pixels of the last block.
      logits: (n, 1008).
    """

    pool_1: Float32[Array, "n _ _ _"]
    pool_2: Float32[Array, "n _ _ _"]
    mixed_6e: Float32[Array, "n _ _ _"]
    pool_3: Float32[Array, "n _"]
    logits: Float32[Array, "n classes"]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with its stored statistics, ReLU."""

    features: int
    size: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float32[Array, "n H W c"]) -> Float32[Array, "n h w d"]:
        # TF32 and bfloat16 passes would change FID, so float32 on every device.
        x = nn.Conv(
            self.features, self.size, self.stride, self.padding, use_bias=False, name="conv",
            precision=jax.lax.Precision.HIGHEST,
        )(x)  # fmt: skip
        return nn.relu(StoredNorm(name="bn")(x))


class StoredNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias, with mean and var as parameters."""

    @nn.compact
    def __call__(self, x: Float32[Array, "n h w d"]) -> Float32[Array, "n h w d"]:
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        shape = (1, 1, 1, x.shape[-1])
        scale, bias, mean, var = (
            self.param(name, init, shape[-1:]).reshape(shape)
            for name, init in (("scale", ones), ("bias", zeros), ("mean", zeros), ("var", ones))
        )
        return (x - mean) * (jax.lax.rsqrt(var + EPS) * scale) + bias


class Block(nn.Module):
    """Base of all blocks: convolutions by name, with widths divided for tests."""

    divisor: int

    def conv(
        self,
        x: Float32[Array, "n H W c"],
        name: str,
        features: int,
        size: int | tuple[int, int],
        stride: int = 1,
        padding: str = "SAME",
    ) -> Float32[Array, "n h w d"]:
        """Applies a convolution of this name; `size` is its kernel's side, or (rows, columns)."""
        size = (size, size) if isinstance(size, int) else size
        return ConvNorm(features // self.divisor, size, stride, padding, name=name)(x)

    def chain(
        self, x: Float32[Array, "n H W c"], prefix: str, *convs: tuple[Any, ...]
    ) -> Float32[Array, "n h w d"]:
        """Applies convolutions one after another: prefix_1, prefix_2, ..."""
        for i, arguments in enumerate(convs, 1):
            x = self.conv(x, f"{prefix}_{i}", *arguments)
        return x


class BlockA(Block):
    """Block at 35 x 35 pixels: 1x1, 5x5, two 3x3, pooling."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float32[Array, "n h w c"]) -> Float32[Array, "n h w d"]:
        branches = [
            self.conv(x, "branch1x1", 64, 1),
            self.chain(x, "branch5x5", (48, 1), (64, 5)),
            self.chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            self.conv(_mean_pool(x), "branch_pool", self.pool_features, 1),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(Block):
    """Block from 35 x 35 pixels to 17 x 17."""

    @nn.compact
    def __call__(self, x: Float32[Array, "n H W c"]) -> Float32[Array, "n h w d"]:
        branches = [
            self.conv(x, "branch3x3", 384, 3, 2, "VALID"),
            self.chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3, 2, "VALID")),
            nn.max_pool(x, (3, 3), (2, 2)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(Block):
    """Block at 17 x 17 pixels: 1x1, 7x7 and two 7x7 as rows and columns, pooling."""

    inner: int

    @nn.compact
    def __call__(self, x: Float32[Array, "n h w c"]) -> Float32[Array, "n h w d"]:
        inner, row, column = self.inner, (1, 7), (7, 1)
        double = ((inner, 1), (inner, column), (inner, row), (inner, column), (192, row))
        branches = [
            self.conv(x, "branch1x1", 192, 1),
            self.chain(x, "branch7x7", (inner, 1), (inner, row), (192, column)),
            self.chain(x, "branch7x7dbl", *double),
            self.conv(_mean_pool(x), "branch_pool", 192, 1),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(Block):
    """Block from 17 x 17 pixels to 8 x 8."""

    @nn.compact
    def __call__(self, x: Float32[Array, "n H W c"]) -> Float32[Array, "n h w d"]:
        last = (192, 3, 2, "VALID")
        branches = [
            self.chain(x, "branch3x3", (192, 1), (320, 3, 2, "VALID")),
            self.chain(x, "branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), last),
            nn.max_pool(x, (3, 3), (2, 2)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(Block):
    """Block at 8 x 8 pixels: 1x1, 3x3 and two 3x3 that split into a row and a column, pooling."""

    pool_by_maximum: bool

    @nn.compact
    def __call__(self, x: Float32[Array, "n h w c"]) -> Float32[Array, "n h w d"]:
        single = self.conv(x, "branch3x3_1", 384, 1)
        double = self.chain(x, "branch3x3dbl", (448, 1), (384, 3))
        if self.pool_by_maximum:  # in the released graph's last block, unlike in the paper
            pooled = nn.max_pool(x, (3, 3), padding="SAME")
        else:
            pooled = _mean_pool(x)
        branches = [
            self.conv(x, "branch1x1", 320, 1),
            self.conv(single, "branch3x3_2a", 384, (1, 3)),
            self.conv(single, "branch3x3_2b", 384, (3, 1)),
            self.conv(double, "branch3x3dbl_3a", 384, (1, 3)),
            self.conv(double, "branch3x3dbl_3b", 384, (3, 1)),
            self.conv(pooled, "branch_pool", 192, 1),
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(Block):
    """Inception-v3: images (n, 299, 299, 3) as from metrics.resize.to_inputs -> Activations."""

    classes: int

    @nn.compact
    def __call__(self, x: Float32[Array, "n H W 3"]) -> Activations:
        x = self.conv(x, "Conv2d_1a_3x3", 32, 3, 2, "VALID")
        x = self.conv(x, "Conv2d_2a_3x3", 32, 3, 1, "VALID")
        x = self.conv(x, "Conv2d_2b_3x3", 64, 3)
        pool_1 = x = nn.max_pool(x, (3, 3), (2, 2))
        x = self.conv(x, "Conv2d_3b_1x1", 80, 1)
        x = self.conv(x, "Conv2d_4a_3x3", 192, 3, 1, "VALID")
        pool_2 = x = nn.max_pool(x, (3, 3), (2, 2))
        for name, features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(self.divisor, features, name=name)(x)
        x = BlockB(self.divisor, name="Mixed_6a")(x)
        for name, inner in (
            ("Mixed_6b", 128),
            ("Mixed_6c", 160),
            ("Mixed_6d", 160),
            ("Mixed_6e", 192),
        ):
            x = BlockC(self.divisor, inner, name=name)(x)
        mixed_6e = x
        x = BlockD(self.divisor, name="Mixed_7a")(x)
        x = BlockE(self.divisor, False, name="Mixed_7b")(x)
        x = BlockE(self.divisor, True, name="Mixed_7c")(x)
        pool_3 = x.mean(axis=(1, 2))
        dense = nn.Dense(self.classes, precision=jax.lax.Precision.HIGHEST, name="fc")
        return Activations(pool_1, pool_2, mixed_6e, pool_3, dense(pool_3))


def make_inception(config: InceptionConfig) -> Inception:
    """Returns the network of a config."""
    return Inception(config.divisor, config.classes)


def _mean_pool(x: Float32[Array, "n h w c"]) -> Float32[Array, "n h w c"]:
    """Averages 3 x 3 pixels; at the border, those inside the image."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
