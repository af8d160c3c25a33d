"""A linear stand-in for the VAE: principal components of image patches.

Encodes each p x p patch of an image as a few numbers, so that small models can train on small
images without pretrained weights. A Codec of towers.py.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from jax.sharding import Sharding
from jaxtyping import Float

from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError, visible
from microdit_jax.files import read_json, read_npz

_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class PatchPCA:
    """A fitted codec; make one with `fit` or `load`.

    Attributes:
      name: that datasets and models carry to find the codec again.
      patch: side of a patch, in pixels.
      mean: (p*p*3,) mean patch, flattened in (row, column, colour) order.
      basis: (p*p*3, c) orthonormal columns, by falling variance.
      gain: (c,) factor of each component after projection; see `fit`.
      scaling_factor: latents times this have standard deviation 0.9 over the fitted images.
    """

    name: str
    patch: int
    mean: Float[np.ndarray, " d"]
    basis: Float[np.ndarray, "d c"]
    gain: Float[np.ndarray, " c"]
    scaling_factor: float

    @property
    def channels(self) -> int:
        """Channels c of the latents."""
        return self.basis.shape[1]

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along a side of the image for one latent: the patch's side."""
        return self.patch

    @property
    def on_device(self) -> bool:
        """False: NumPy computes it on the host."""
        return False

    def with_sharding(self, sharding: Sharding) -> "PatchPCA":
        """Returns itself: it computes on the host."""
        return self

    @classmethod
    def fit(
        cls,
        images: Float[np.ndarray, "n H W 3"],
        *,
        patch: int,
        channels: int,
    ) -> "PatchPCA":
        """Principal components of all patches of `images`; the same images give the same codec.

        Each component is divided by the square root of its standard deviation. That lies halfway
        between two extremes: latent distances equal to pixel distances, where the mean colour
        drowns the detail, and equal deviations, where all detail weighs as much as the mean colour.

        Args:
          images: in [-1, 1]; sides must be multiples of `patch`.
          patch: side of a patch, in pixels.
          channels: components kept, at most 3 * patch**2.
        Raises:
          UserError: if sizes do not fit.
        """
        if not 0 < channels <= 3 * patch**2:
            raise UserError(
                f"expected 1 to {3 * patch**2} channels for {patch}x{patch} patches, "
                f"found {channels}: choose fewer channels or larger patches"
            )
        patches = _to_patches(images, patch).reshape(-1, 3 * patch**2)
        mean = patches.mean(axis=0, dtype=np.float64)
        # float64: the covariance of millions of patches, then a full symmetric eigenproblem
        second_moment = sum(
            block.T @ block for block in (b.astype(np.float64) for b in np.array_split(patches, 64))
        )
        variance, vectors = np.linalg.eigh(second_moment / len(patches) - np.outer(mean, mean))
        variance, basis = variance[::-1][:channels], vectors[:, ::-1][:, :channels]
        # Eigenvectors have no sign of their own: make each one's largest entry positive.
        largest = np.abs(basis).argmax(axis=0)
        basis = basis * np.sign(basis[largest, np.arange(channels)])

        deviation = np.sqrt(np.maximum(variance, 1e-12))
        gain = deviation**-0.5
        scaling_factor = EdmConfig().sigma_data / np.sqrt(np.mean((deviation * gain) ** 2))
        mean, basis, gain = (a.astype(np.float32) for a in (mean, basis, gain))
        size = "x".join(map(str, images.shape[:3]))
        name = f"patch_pca:patch={patch},channels={channels},images={size}"
        return cls(name, patch, mean, basis, gain, float(scaling_factor))

    def encode(
        self,
        images: Float[np.ndarray, "n H W 3"],
        *,
        noise: Float[np.ndarray, "n h w c"] | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """Encodes images (n, H, W, 3) in [-1, 1] as raw latents (n, H/p, W/p, channels), float32.

        Args:
          noise: makes no difference: a projection has no distribution to sample from.
        """
        patches = _to_patches(images, self.patch)  # n h w p*p*3
        return ((patches - self.mean) @ self.basis) * self.gain

    def decode(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n H W 3"]:
        """Decodes raw latents (n, h, w, channels) to float32 images (n, h*p, w*p, 3) in [-1, 1]."""
        n, h, w, c = latents.shape
        if c != self.channels:
            raise UserError(
                f"expected latents with {self.channels} channels, found {c}: "
                f"decode them with the codec that made them"
            )
        patches = (np.asarray(latents, np.float32) / self.gain) @ self.basis.T + self.mean
        patches = patches.reshape(n, h, w, self.patch, self.patch, 3)
        images = patches.transpose(0, 1, 3, 2, 4, 5)  # n h p w p 3
        return np.clip(images.reshape(n, h * self.patch, w * self.patch, 3), -1.0, 1.0)

    def save(self, folder: Path) -> None:
        """Writes codec.npz and codec.json into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "codec.npz", mean=self.mean, basis=self.basis, gain=self.gain)
        about = {
            "format": "patch_pca",
            "version": _FORMAT_VERSION,
            "name": self.name,
            "patch": self.patch,
            "channels": self.channels,
            "scaling_factor": self.scaling_factor,
        }
        (folder / "codec.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "PatchPCA":
        """Reads what `save` wrote.

        Raises:
          UserError: if the folder holds no codec of this format and version.
        """
        try:
            about = read_json(folder / "codec.json")
            found = (about["format"], about["version"])
            arrays = read_npz(folder / "codec.npz")
            mean, basis, gain = (arrays[key] for key in ("mean", "basis", "gain"))
            sizes = about["patch"], about["channels"]
            whole = all(type(size) is int and 1 <= size <= 2**12 for size in sizes)
            whole = whole and basis.shape == (3 * sizes[0] ** 2, sizes[1])
            whole = whole and mean.shape == basis.shape[:1] and gain.shape == basis.shape[1:]
            whole = whole and all(array.dtype.kind == "f" for array in (mean, basis, gain))
            factor = float(about["scaling_factor"])
            whole = whole and isinstance(about["name"], str) and 0 < factor < math.inf
            if not whole:
                raise ValueError("sizes or types that do not fit each other")
            codec = cls(about["name"], sizes[0], mean, basis, gain, factor)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(
                f"expected codec.json and codec.npz of a patch codec in {folder}, could not read "
                f"them ({visible(repr(error))}): delete the folder and prepare the data again"
            ) from error
        if found != ("patch_pca", _FORMAT_VERSION):
            raise UserError(
                f"expected a patch_pca codec, version {_FORMAT_VERSION}, in {folder}, found "
                f"{visible(found, 80)}: prepare the data again"
            )
        return codec


def _to_patches(images: np.ndarray, patch: int) -> np.ndarray:
    """Cuts (n, H, W, 3) into patches (n, H/p, W/p, p*p*3), in (row, column, colour) order."""
    n, height, width, colours = images.shape
    if height % patch or width % patch or colours != 3:
        raise UserError(
            f"expected RGB images with sides in multiples of {patch} pixels, found "
            f"{height}x{width}x{colours}: resize them or choose another patch"
        )
    patches = images.reshape(n, height // patch, patch, width // patch, patch, 3)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)  # n h w p p 3
    return np.ascontiguousarray(patches, np.float32).reshape(
        n, height // patch, width // patch, 3 * patch**2
    )
