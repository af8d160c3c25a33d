"""The autoencoder with its weights, as a Codec of towers.py: images to latents and back."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float

from microdit_jax.encoders.vae import AutoencoderKL, VaeConfig, sample_latents
from microdit_jax.errors import UserError
from microdit_jax.machine.placement import map_batches, rows_sharding


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _apply(params: Any, x: Float[Array, "n H W c"], *, model: AutoencoderKL, method: str) -> Any:
    return model.apply({"params": params}, x, method=method)


@dataclasses.dataclass(frozen=True, eq=False)
class VaeCodec:
    """An autoencoder with its weights: a Codec.

    Attributes:
      name: that datasets and models carry to find the codec again.
      config: sizes, and the type of the computation.
      params: parameters of `AutoencoderKL(config)`, on the devices that are to compute.
      slice_size: images for each device in one call of the network, which takes about 1 GB for
        each image at 512 px in float32 (0.9 GB measured on CPU).
    """

    name: str
    config: VaeConfig
    params: Any
    slice_size: int = 1

    def __post_init__(self):
        if self.slice_size < 1:
            raise UserError(f"slice_size must be at least 1, found {self.slice_size}; raise it")

    @property
    def scaling_factor(self) -> float:
        """Factor on latents before the diffusion model sees them."""
        return self.config.scaling_factor

    @property
    def channels(self) -> int:
        """Channels c of the latents."""
        return self.config.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along a side of the image for one latent."""
        return self.config.factor

    @property
    def on_device(self) -> bool:
        """True: JAX computes it where its weights are."""
        return True

    def with_sharding(self, sharding: Sharding) -> "VaeCodec":
        """Returns the codec with its weights laid out by `sharding`."""
        return dataclasses.replace(self, params=jax.device_put(self.params, sharding))

    def encode(
        self,
        images: Float[np.ndarray, "n H W colours"],
        *,
        noise: Float[np.ndarray, "n h w c"] | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """Encodes images (n, H, W, 3) in [-1, 1] as latents (n, h, w, channels), float32.

        The config's shift or mean is taken from them, as diffusers' pipelines do.

        Args:
          noise: standard normal numbers to sample the latents with; None: the distribution's mode.
        Raises:
          UserError: sides that do not fit, or latents that are not finite.
        """
        mean, logvar = self._in_slices(images, "encode_moments")
        latents = mean
        if noise is not None:
            latents = np.asarray(sample_latents(*map(jnp.asarray, (mean, logvar, noise))))
        _check_finite(latents, "latents", self.config)
        shift, deviation = self._constants()
        return latents if shift is None else (latents - shift) / deviation

    def decode(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n H W 3"]:
        """Decodes latents (n, h, w, channels) to images (n, H, W, 3), float32 in [-1, 1].

        They are shifted as those of `encode`.

        Raises:
          UserError: another number of channels, or images that are not finite.
        """
        shift, deviation = self._constants()
        raw = latents if shift is None else latents * deviation + shift
        (images,) = self._in_slices(raw, "decode")
        _check_finite(images, "images", self.config)
        return np.clip(images, -1.0, 1.0)

    def _constants(self) -> tuple[np.ndarray | None, np.ndarray]:
        """Shift and deviation of raw latents, for each channel or all; no shift: neither."""
        config, one = self.config, np.ones(1, np.float32)
        if config.latents_mean is not None and config.latents_std is not None:
            mean, deviation = config.latents_mean, config.latents_std
            return np.array(mean, np.float32), np.array(deviation, np.float32)
        return (np.full(1, config.shift_factor, np.float32) if config.shift_factor else None), one

    def _in_slices(self, x: np.ndarray, method: str) -> list[np.ndarray]:
        """Runs the network slice by slice; the last is filled up, so that all run one program."""
        if not len(x):
            raise UserError("expected at least one image for the VAE, found none")
        _, devices = rows_sharding(self.params)
        size = devices * min(self.slice_size, -(-len(x) // devices))
        model = AutoencoderKL(self.config)

        def apply(params, rows):
            return jax.tree.leaves(_apply(params, rows, model=model, method=method))

        return map_batches(
            apply, self.params, x, lambda rows: np.asarray(rows, np.float32), size=size
        )


def _check_finite(values: np.ndarray, what: str, config: VaeConfig) -> None:
    if not np.isfinite(values).all():
        raise UserError(
            f"expected finite {what} from the VAE, found NaN or infinity; check what went in and "
            f"its weights{', or use float32' if config.dtype != 'float32' else ''}"
        )
