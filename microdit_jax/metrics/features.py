"""Feature vectors of images, on all devices of this process: Inception's, or small ones."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, UInt8

from microdit_jax.machine.placement import map_batches, mesh_of
from microdit_jax.metrics.inception import Activations, InceptionConfig, make_inception
from microdit_jax.metrics.resize import resize, to_inputs

INCEPTION_WIDTH = 2048  # features of pool_3
SMALL_SIDE, SMALL_WIDTHS = 32, (16, 32, 64)


class FeatureNetwork:
    """A frozen network from uint8 images to feature vectors, in batches over all local devices.

    Attributes:
      name: name of the feature space; statistics of one cannot be compared with another's.
      width: features of an image.
    """

    def __init__(
        self,
        name: str,
        width: int,
        params: Any,
        apply: Callable[[Any, Array], Array],
        prepare: Callable[[Sequence[np.ndarray]], np.ndarray],
        *,
        batch: int = 32,
    ):
        """Prepares the network; compiles nothing yet.

        Args:
          params: weights; copied to every device unless they are on a mesh already.
          apply: (params, inputs) -> (n, width).
          prepare: uint8 images to the inputs of `apply`, a row for each.
          batch: images at a time; the last batch is filled up.
        """
        self.name, self.width, self._prepare, self._batch = name, width, prepare, batch
        self._params = on_all_devices(params) if mesh_of(params) is None else params
        self._apply = jax.jit(apply)

    def __call__(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    ) -> Float32[np.ndarray, "n {self.width}"]:
        """Computes the features (n, width) of uint8 images of any size."""
        if not len(images):
            return np.zeros((0, self.width), np.float32)
        return map_batches(self._apply, self._params, images, self._prepare, size=self._batch)


def on_all_devices(params: Any) -> Any:
    """Copies the parameters to each device of this process."""
    mesh = Mesh(np.asarray(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(params, NamedSharding(mesh, P()))


def inception_features(
    config: InceptionConfig,
    params: Any,
    *,
    weights: str,
    mode: str = "clean",
    batch: int = 32,
) -> FeatureNetwork:
    """Returns the features of FID: Inception's last layer before its logits, 2048 wide.

    Args:
      weights: hash of the weights, for the name.
      mode: how images are resized, one of metrics.resize.MODES.
    """
    network = make_inception(config)

    def apply(params, x):
        return cast(Activations, network.apply({"params": params}, x)).pool_3

    name = f"inception:weights={weights[:12]},layer=pool_3,resize={mode}"
    width = INCEPTION_WIDTH // config.divisor
    return FeatureNetwork(
        name, width, params, apply, lambda images: to_inputs(images, mode), batch=batch
    )


def small_features(*, batch: int = 64) -> FeatureNetwork:
    """Returns 112 features of 32 px images that need no download: a fixed random convolutional net.

    They are means over pixels after each of three layers, with He's normal weights from a fixed
    seed. They tell better from worse images of one small data set, and nothing else: a Fréchet
    distance in them is not comparable with any published FID.
    """
    rng = np.random.RandomState(0)  # NumPy promises never to change its stream
    params, channels = [], 3
    for width in SMALL_WIDTHS:
        kernel = rng.standard_normal((3, 3, channels, width)) * np.sqrt(2 / (9 * channels))
        params.append(kernel.astype(np.float32))
        channels = width

    def apply(params, x):
        means = []
        for kernel in params:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )  # fmt: skip
            x = jax.nn.relu(x)
            means.append(x.mean(axis=(1, 2)))
            n, height, width, c = x.shape
            x = x.reshape(n, height // 2, 2, width // 2, 2, c).mean(axis=(2, 4))
        return jnp.concatenate(means, axis=-1)

    return FeatureNetwork(
        "small_random_network:v1", sum(SMALL_WIDTHS), params, apply, _small_inputs, batch=batch
    )


def _small_inputs(images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float32[np.ndarray, "n H W 3"]:
    """Resizes images to 32 x 32 floats in [-1, 1]."""
    side = SMALL_SIDE
    return np.stack([resize(image, height=side, width=side) for image in images]) / 127.5 - 1
