"""Turns prompts into images: a text encoder, the network in its sampler, and a VAE."""

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Shaped

from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.models.dit import DiT
from microdit_jax.noise import added_noise, initial_noise
from microdit_jax.sampling.editing import Edit, make_edit
from microdit_jax.sampling.loop import BatchInputs, Preview, Progress, SamplerLoop, timed
from microdit_jax.sampling.settings import Sampler
from microdit_jax.sampling.student import Student, settled
from microdit_jax.towers import Codec, TextEncoder


class ImageBatch(NamedTuple):
    """Images that were sampled together.

    Attributes:
      indices: of the images in their set.
      images: (m, H, W, 3) float32 in [0, 1].
      seconds: what each part took: "text", "compiling", "sampling" and "decoding".
    """

    indices: list[int]
    images: Float32[np.ndarray, "m H W 3"]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class LatentDiffusion:
    """A network with its frozen towers: prompts in, images out.

    Everything runs where the weights are: on a mesh, a batch is split over all of its devices.
    Programs are compiled once; a copy by `dataclasses.replace`, with other weights of the same
    shapes and shardings, shares them.

    Attributes:
      student: of a network that is a few-step student: what its teacher was.
      weaker: weights of a network that was trained less, for autoguidance.
    """

    model: DiT
    params: Any
    edm: EdmConfig
    text_encoder: TextEncoder
    codec: Codec | None  # None on a process that needs latents alone
    description: str = ""
    student: Student | None = None
    weaker: Any = None
    _programs: dict = dataclasses.field(default_factory=dict, repr=False)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        tokenized_prompts: Int[np.ndarray, "n l"] | None = None,
        attention_mask: Shaped[np.ndarray, "..."] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        seed: int | Sequence[int] | None = None,
        return_only_latents: bool = False,
        *,
        image: Any = None,
        mask: Any = None,
        noise: str | Float[np.ndarray, "n h w c"] = "jax",
        batch_size: int = 32,
        progress: Progress | None = None,
        **sampler: Any,
    ) -> Float32[np.ndarray, "n _ _ _"]:
        """Samples one image for each prompt.

        Args:
          prompt: texts; one that is too long is cut, as `text_encoder.tokenizer` says.
          tokenized_prompts: token ids (n, l) int32, instead of texts.
          attention_mask: (n, l), nonzero at text, for ids of T5, which sees no padding. CLIP's
            towers see it, as they did in training, and take no notice of a mask.
          guidance_scale: classifier-free guidance; 1 means none, 0 the unconditional model; None:
            5, or what a student has built in.
          num_inference_steps: steps of the solver; Heun's are two network evaluations each, but
            the last. None: the solver's own number, 30 of Heun's.
          seed: of the initial noise; None chooses one at random. With one for each image, each is
            the first image of its seed.
          return_only_latents: skip the decoder.
          image: an image to be changed, as `editing.make_edit` takes it; how much of the sampler's
            way it goes says strength, which is needed then.
          mask: where it is changed, likewise; None: everywhere.
          noise: "jax", or "torch_cpu" / "torch_cuda" for the reference's own; or the standard
            normal noise itself.
          batch_size: images sampled at a time, at most.
          progress: wraps the sequence of network evaluations, to show a bar or to stop by raising.
          sampler: other fields of `settings.Sampler`: solver, schedule, guidance and more.
        Returns:
          float32 (n, H, W, 3) in [0, 1], or latents float32 (n, h, w, channels).
        Raises:
          UserError: no prompt, or a value out of range; not enough memory; latents that are not
            finite.
        """
        y = self.encode(prompt, tokenized_prompts, attention_mask)
        if isinstance(noise, str):
            seed = secrets.randbits(32) if seed is None else seed
        latents = self.denoise(
            y,
            self._noise_of(noise, seed, len(y))(range(len(y))),
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            batch_size=min(batch_size, len(y)),
            progress=progress,
            edit=self.edit(image, mask),
            seed=seed,
            **sampler,
        )
        return latents if return_only_latents else self.decode(latents)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        indices: Sequence[int] | None = None,
        total: int | None = None,
        noise: str = "jax",
        batch_size: int = 32,
        progress: Progress | None = None,
        preview: Preview | None = None,
        edit: Edit | None = None,
        **sampler: Any,
    ) -> Iterator[ImageBatch]:
        """Samples images of a larger set batch by batch, so that each can be kept at once.

        Image i is a function of the weights, its prompt, the noise of (seed, i) and the sampler's
        settings: a caller that leaves out the indices it has resumes the set, in any batches and
        on any devices.

        Args:
          prompts: one for each image that is asked for.
          seed: of the initial noise.
          indices: each image's index in the set; None: 0, 1, ...
          total: images in the whole set; None: one more than the largest index. The torch kinds of
            noise depend on it.
          noise: "jax", "torch_cpu" or "torch_cuda".
          batch_size: images sampled at a time; the last batch is filled up to it, so that every
            batch of every call runs the same program. On a mesh, rounded up to its number of
            devices.
          preview: called at each step of each batch, as `Preview` says.
          edit: an image that all are made from, by `edit`.
          sampler: fields of `settings.Sampler`, such as num_inference_steps.

        The other arguments, and what is raised, are `generate`'s.
        Yields:
          The images of each batch in the order asked for, without what it was filled up with.
        """
        indices = range(len(prompts)) if indices is None else indices
        total = max(indices, default=-1) + 1 if total is None else total
        if len(indices) != len(prompts) or not all(0 <= i < total for i in indices):
            found = f"{len(indices)} from {min(indices, default=0)} to {max(indices, default=0)}"
            raise UserError(
                f"expected {len(prompts)} indices from 0 to {total - 1}, one for each prompt, "
                f"found {found}"
            )
        noise_of = self._noise_of(noise, seed, total)
        settings = self.settings(sampler, edit)

        def inputs(rows: slice) -> BatchInputs:
            own = indices[rows]
            return BatchInputs.of(self.encode(prompts[rows]), noise_of(own), edit)

        for rows, latents, seconds in self._loop.run(
            len(prompts),
            inputs,
            settings,
            unconditional=self._negative(settings),
            added=lambda rows, number: self._added([(seed, i) for i in indices[rows]], number),
            batch_size=batch_size,
            progress=progress,
            preview=preview,
        ):
            with timed(seconds, "decoding"):
                images = self.decode(latents)
            yield ImageBatch(list(indices[rows]), images, seconds)

    def encode(
        self,
        prompt: str | Sequence[str] | None = None,
        tokenized_prompts: Int[np.ndarray, "n l"] | None = None,
        attention_mask: Shaped[np.ndarray, "..."] | None = None,
    ) -> Float[np.ndarray, "n l caption"]:
        """Embeds texts or token ids; a text that comes several times is computed once."""
        if (prompt is None) == (tokenized_prompts is None):
            raise UserError("give either prompt or tokenized_prompts, found both or neither")
        if tokenized_prompts is not None:
            ids = np.asarray(tokenized_prompts, np.int32)
            return self.text_encoder.encode(ids, attention_mask)
        if attention_mask is not None:
            raise UserError("attention_mask belongs to tokenized_prompts, found it with texts")
        texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not texts or not all(text.strip() for text in texts):
            raise UserError("expected prompts, found none or an empty one; say what to sample")
        different = sorted(set(texts))
        return self.text_encoder.encode_text(different)[[different.index(text) for text in texts]]

    def dropped(self, prompts: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Counts the tokens of each prompt that are cut off; 0 if there is no tokenizer."""
        tokenizer = self.text_encoder.tokenizer
        return np.zeros(len(prompts), int) if tokenizer is None else tokenizer.dropped(prompts)

    def denoise(
        self,
        caption_latents: Float[np.ndarray, "n l caption"],
        noise: Float[np.ndarray, "n h w c"],
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
        edit: Edit | None = None,
        seed: int | Sequence[int] | None = None,
        **sampler: Any,
    ) -> Float[np.ndarray, "n h w c"]:
        """Samples scaled latents (n, h, w, channels) float32 of n captions from given noise.

        Args:
          batch_size: as `sample` takes it; None: all images at once.
          edit: an image that all are made from, by `edit`.
          seed: of noise that the sampler adds on its way, one or one for each image; None: 0.
          sampler: fields of `settings.Sampler`, such as num_inference_steps.

        The other arguments, and what is raised, are `generate`'s.
        """
        settings = self.settings(sampler, edit)
        if isinstance(seed, Sequence):
            own = [(one, 0) for one in seed]
        else:
            own = [(seed or 0, i) for i in range(len(noise))]
        batches = self._loop.run(
            len(noise),
            lambda rows: BatchInputs.of(caption_latents[rows], noise[rows], edit),
            settings,
            unconditional=self._negative(settings),
            added=lambda rows, number: self._added(own[rows], number),
            batch_size=batch_size or len(noise),
            progress=progress,
        )
        return np.concatenate([latents for _, latents, _ in batches])

    def settings(self, chosen: Mapping[str, Any], edit: Edit | None = None) -> Sampler:
        """Returns a sampler's settings, with those that the network decides filled in.

        Args:
          chosen: fields of `settings.Sampler`; None stands for one that is not chosen.
        Raises:
          UserError: what `student.settled` and `Sampler` raise, or an image without strength.
        """
        sampler = Sampler(**settled(dict(chosen), self.student))
        if (edit is None) != (sampler.strength is None):
            raise UserError(
                "an image to be changed goes with a strength, found "
                + ("a strength alone" if edit is None else "an image alone; give strength=0.6")
            )
        return sampler

    def edit(self, image: Any, mask: Any = None) -> Edit | None:
        """Fits and encodes an image that is to be changed, as `editing.make_edit` does.

        Returns:
          None if there is no image.
        """
        if image is None:
            if mask is not None:
                raise UserError("a mask goes with an image, found a mask alone")
            return None
        assert self.codec is not None, "this process has no codec"
        side = self.model.config.input_size * self.codec.pixels_per_latent
        return make_edit(self.codec, side, image, mask)

    def decode(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n H W 3"]:
        """Decodes scaled latents to images in [0, 1]."""
        assert self.codec is not None, "this process has no codec"
        images = self.codec.decode(latents / np.float32(self.codec.scaling_factor))
        return np.clip(images / 2 + 0.5, 0, 1).astype(np.float32)

    def warm_up(self, num_images: int, *, batch_size: int = 32, **sampler: Any) -> None:
        """Compiles all programs that sampling `num_images` runs, and keeps them.

        Args:
          sampler: fields of `settings.Sampler`.
        """
        count = min(batch_size, num_images)
        settings = Sampler(**settled(sampler, self.student))
        size = self._loop.warm_up(count, self.encode(["a"]).shape[1], settings)
        self.decode(np.zeros((size, *self._latent_shape()), np.float32)[:count])

    @property
    def _loop(self) -> SamplerLoop:
        return SamplerLoop(self.model, self.params, self.edm, self._programs, self.weaker)

    def _added(
        self, images: Sequence[tuple[int, int]], number: int
    ) -> Float32[np.ndarray, "m h w c"]:
        """Returns the noise that is added to images, given by seed and index, on their way."""
        shape = self._latent_shape()
        return np.stack([added_noise(seed, index, number, shape) for seed, index in images])

    def _negative(self, sampler: Sampler) -> Float[np.ndarray, "l caption"] | None:
        """Embeds the negative prompt; None if there is none."""
        return self.encode([sampler.negative_prompt])[0] if sampler.negative_prompt else None

    def _latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image's latents."""
        cfg = self.model.config
        return cfg.input_size, cfg.input_size, cfg.in_channels

    def _noise_of(
        self,
        noise: str | Float[np.ndarray, "n h w c"],
        seed: int | Sequence[int] | None,
        total: int,
    ) -> Callable[[Sequence[int]], Float32[np.ndarray, "m h w c"]]:
        """Returns a function from indices in a set of `total` images to their initial noise."""
        shape = self._latent_shape()
        if not isinstance(noise, str):
            if seed is not None or noise.shape != (total, *shape):
                raise UserError(
                    f"expected noise {(total, *shape)} and no seed, found noise {noise.shape} and "
                    f"seed {seed}"
                )
            whole = np.asarray(noise, np.float32)
            return lambda indices: whole[list(indices)]
        if isinstance(seed, Sequence):
            if len(seed) != total:
                raise UserError(f"expected {total} seeds, one for each image, found {len(seed)}")
            each = [initial_noise(noise, one, 1, *shape) for one in seed]
            return lambda indices: np.concatenate([each[i] for i in indices])
        if noise == "jax":  # each image's noise is its own; only what is asked for is computed
            return lambda indices: np.concatenate(
                [initial_noise(noise, seed, 1, *shape, first=i) for i in indices]
            )
        whole = initial_noise(noise, seed, total, *shape)
        return lambda indices: whole[list(indices)]
