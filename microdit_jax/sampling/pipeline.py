"""From prompts to pictures: a text tower, the network in its sampler, and a VAE."""

import dataclasses
import functools
import itertools
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Shaped

from microdit_jax import diffusion, sharding
from microdit_jax.diffusion import EdmConfig, HeunState
from microdit_jax.errors import UserError
from microdit_jax.machine import memory
from microdit_jax.machine.placement import fetch, put_rows, rows_sharding
from microdit_jax.models.dit import Caption, DiT
from microdit_jax.noise import initial_noise


def _on_each_device(
    function: Callable, mesh: Mesh | None, params: Any, rows: tuple, whole: tuple = ()
) -> Any:
    """function(params, *rows, *whole), each device with its own rows and all weights.

    So pictures are computed as on one device, whatever the partitioner might think of, and Pallas
    and cuDNN kernels work. Weights that are split over `fsdp` are gathered; experts split over
    `expert` stay where they are and tokens travel.
    """
    if mesh is None:
        return function(params, *rows, *whole)
    specs = sharding.specs(params, mesh)

    def local(shards, rows, whole):
        return function(sharding.gather(shards, specs), *rows, *whole)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, sharding.BATCH, P()),
        out_specs=sharding.BATCH,
        check_vma=False,  # it would refuse Pallas kernels
    )(params, rows, whole)


@functools.partial(jax.jit, static_argnames=("model", "guide", "mesh"))
def encode_captions(
    params: Any,
    caption_latents: Float[Array, "n l caption"],
    *,
    model: DiT,
    guide: bool,
    mesh: Mesh | None,
) -> Caption:
    """What the network needs of n captions at every noise level, computed once.

    Args:
      guide: with it each caption is followed by the zero caption: rows as `diffusion.guided` has
        them.
      mesh: over which the batch is split, and perhaps the weights.
    """

    def encode(params, y):
        if guide:
            y = diffusion.interleave(y, jnp.zeros_like(y))
        return model.apply({"params": params}, y, method="encode_caption")

    return _on_each_device(encode, mesh, params, (caption_latents,))


@functools.partial(
    jax.jit, static_argnames=("model", "sigma_data", "guide", "mesh"), donate_argnames=("state",)
)
def evaluate_network(
    params: Any,
    caption: Caption,
    state: HeunState,
    at: dict[str, Array],
    guidance_scale: Float[Array, ""],
    *,
    model: DiT,
    sigma_data: float,
    guide: bool,
    mesh: Mesh | None,
) -> HeunState:
    """One of the sampler's evaluations; the same program serves all, whatever their number.

    Args:
      at: a row of `diffusion.heun_evaluations`.
      guidance_scale: traced, so that another value compiles nothing.
    """

    def evaluate(params, caption, state, at, guidance_scale):
        def network(x, c_noise):
            return model.apply({"params": params}, x, c_noise, caption, method="predict")[0]

        if guide:
            network = diffusion.guided(network, guidance_scale)
        return diffusion.heun_evaluate(diffusion.denoiser(network, sigma_data), state, at)

    return _on_each_device(evaluate, mesh, params, (caption, state), (at, guidance_scale))


@dataclasses.dataclass(frozen=True, eq=False)
class LatentDiffusion:
    """A network with its frozen towers: prompts in, pictures out.

    The weights say where things run: on a mesh, pictures are dealt out over all of its devices.
    Programs are compiled once; a copy by `dataclasses.replace`, with other weights of the same
    shapes in the same places, shares them.
    """

    model: DiT
    params: Any
    edm: EdmConfig
    text_encoder: Any
    codec: Any
    description: str = ""
    _programs: dict = dataclasses.field(default_factory=dict, repr=False)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        tokenized_prompts: Int[np.ndarray, "n l"] | None = None,
        attention_mask: Shaped[np.ndarray, "..."] | None = None,
        guidance_scale: float = 5.0,
        num_inference_steps: int = 30,
        seed: int | None = None,
        return_only_latents: bool = False,
        *,
        noise: str | Float[np.ndarray, "n h w c"] = "jax",
        batch_size: int = 32,
        progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
    ) -> Float32[np.ndarray, "n _ _ _"]:
        """Draws one picture for each prompt.

        Args:
          prompt: texts; one that is too long is cut, as `text_encoder.tokenizer` says.
          tokenized_prompts: token ids (n, l) int32, instead of texts.
          attention_mask: (n, l), nonzero at text, for ids of T5, which sees no padding. CLIP's
            towers see it, as they did in training, and take no notice of a mask.
          guidance_scale: classifier-free guidance; 1 or less means none.
          num_inference_steps: steps of the sampler, each two network evaluations but the last.
          seed: of the initial noise; None draws one.
          return_only_latents: skip the decoder.
          noise: "jax", or "torch_cpu" / "torch_cuda" for the reference's own; or the standard
            normal noise itself.
          batch_size: pictures drawn at a time, at most; as in `denoise`.
          progress: wraps the sequence of network evaluations, to show a bar.
        Returns:
          float32 (n, H, W, 3) in [0, 1], or latents float32 (n, h, w, channels).
        Raises:
          UserError: no prompt, or a value out of range; not enough memory; latents that are not
            finite.
        """
        y = self.encode(prompt, tokenized_prompts, attention_mask)
        latents = self.denoise(
            y,
            self._initial_noise(noise, seed, len(y)),
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            batch_size=min(batch_size, len(y)),
            progress=progress,
        )
        return latents if return_only_latents else self.decode(latents)

    def encode(
        self,
        prompt: str | Sequence[str] | None = None,
        tokenized_prompts: Int[np.ndarray, "n l"] | None = None,
        attention_mask: Shaped[np.ndarray, "..."] | None = None,
    ) -> Float[np.ndarray, "n l caption"]:
        """Embeddings of texts or token ids, each different text computed once."""
        if (prompt is None) == (tokenized_prompts is None):
            raise UserError("give either prompt or tokenized_prompts, found both or neither")
        if tokenized_prompts is not None:
            ids = np.asarray(tokenized_prompts, np.int32)
            masks = {} if attention_mask is None else {"attention_mask": attention_mask}
            return self.text_encoder.encode(ids, **masks)
        if attention_mask is not None:
            raise UserError("attention_mask belongs to tokenized_prompts, found it with texts")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts or not all(text.strip() for text in texts):
            raise UserError('expected prompts, found none or an empty one; give --prompt="..."')
        different = sorted(set(texts))
        return self.text_encoder.encode_text(different)[[different.index(text) for text in texts]]

    def dropped(self, prompts: Sequence[str]) -> Int[np.ndarray, " n"]:
        """How many tokens of each prompt are cut; 0 without a tokenizer: `encode` asks for one."""
        tokenizer = self.text_encoder.tokenizer
        return np.zeros(len(prompts), int) if tokenizer is None else tokenizer.dropped(prompts)

    def denoise(
        self,
        caption_latents: Float[np.ndarray, "n l caption"],
        noise: Float[np.ndarray, "n h w c"],
        *,
        guidance_scale: float,
        num_inference_steps: int,
        batch_size: int | None = None,
        progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
        preview: Callable[[int, int, Float[np.ndarray, "m h w c"]], None] | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """Scaled latents (n, h, w, channels) float32 of n captions, from standard normal noise.

        Args:
          batch_size: pictures drawn at a time, always so many: the last batch is filled up, so
            that every batch, of every call, runs the same program; None: all at once. On a mesh,
            rounded up to its number of devices.
          preview: called at each step with the index of the batch's first picture, the step, and
            what the network makes of the noise so far: scaled latents of the batch's pictures.

        The other arguments, and what is raised, are `generate`'s.
        """
        if not np.isfinite(guidance_scale):
            raise UserError(f"guidance_scale must be a finite number, found {guidance_scale}")
        y, x = caption_latents, noise
        size, encode, evaluate = self.programs(batch_size or len(y), y, guidance_scale > 1)
        place, _ = rows_sharding(self.params)
        evaluations = diffusion.heun_evaluations(num_inference_steps, self.edm)
        count, latents = len(evaluations["sigma"]), np.empty_like(x)
        work = list(itertools.product(range(0, len(y), size), range(count)))
        with memory.out_of_memory(f"a smaller batch_size than {size}"):
            for start, i in work if progress is None else progress(work):
                if i == 0:
                    rows = np.resize(np.arange(len(y))[start : start + size], size)
                    caption = encode(self.params, put_rows(y[rows], place))
                    state = _start(put_rows(x[rows], place), edm=self.edm)
                at = {name: values[i] for name, values in evaluations.items()}
                state = evaluate(self.params, caption, state, at, np.float32(guidance_scale))
                if progress is not None:
                    jax.block_until_ready(state)  # or the bar would run ahead of the device
                if preview is not None and not at["corrects"]:
                    found = fetch(_denoised(state, at["sigma"]))
                    preview(start, i // 2, found[: len(y) - start])
                if i == count - 1:
                    latents[start : start + size] = fetch(state.x)[: len(y) - start]
        if not np.isfinite(latents).all():
            raise UserError(
                "expected finite latents, found NaN or infinity; check the weights, or use "
                "dtype='float32' and a lower guidance_scale"
            )
        return latents

    def decode(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n H W 3"]:
        """Pictures in [0, 1] from scaled latents."""
        images = self.codec.decode(latents / np.float32(self.codec.scaling_factor))
        return np.clip(images / 2 + 0.5, 0, 1).astype(np.float32)

    def programs(
        self, batch_size: int, caption_latents: Float[np.ndarray, "n l caption"], guide: bool
    ) -> tuple[int, Callable, Callable]:
        """`encode_captions` and `evaluate_network`, compiled once for each shape.

        Args:
          batch_size: pictures drawn at a time; on a mesh, rounded up to its number of devices.
          caption_latents: the captions; their length counts, not what they say.
        Returns:
          The size of a batch, and the two programs.
        Raises:
          UserError: they need more memory than there is.
        """
        place, devices = rows_sharding(self.params)
        size = -(-batch_size // devices) * devices
        length = caption_latents.shape[1]
        key = (size, length, guide)
        if key not in self._programs:
            cfg = self.model.config
            rows = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=place)
            static = {"model": self.model, "guide": guide, "mesh": getattr(place, "mesh", None)}
            y = rows((size, length, cfg.caption_channels))
            encode = encode_captions.lower(self.params, y, **static).compile()
            caption = jax.tree.map(
                lambda info, at: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=at),
                encode.out_info,
                encode.output_shardings,
            )
            x = rows((size, cfg.input_size, cfg.input_size, cfg.in_channels))
            at = {
                name: jax.ShapeDtypeStruct((), values.dtype)
                for name, values in diffusion.heun_evaluations(1).items()
            }
            evaluate = evaluate_network.lower(
                self.params,
                caption,
                HeunState(x, x, x),
                at,
                jax.ShapeDtypeStruct((), jnp.float32),
                sigma_data=self.edm.sigma_data,
                **static,
            ).compile()
            memory.check_fit(evaluate, rows=size, what="batch_size")
            self._programs[key] = encode, evaluate
        return size, *self._programs[key]

    def warm_up(self, num_images: int, *, batch_size: int = 32, guide: bool = True) -> None:
        """Compiles all that `generate` runs for so many pictures, and keeps it for later runs."""
        captions = self.encode(["a"] * num_images)
        size, _, _ = self.programs(min(batch_size, num_images), captions, guide)
        cfg = self.model.config
        x = np.zeros((num_images, cfg.input_size, cfg.input_size, cfg.in_channels), np.float32)
        place, _ = rows_sharding(self.params)
        _start(put_rows(x[:1].repeat(size, 0), place), edm=self.edm)
        self.decode(x)

    def _initial_noise(self, noise, seed: int | None, count: int) -> np.ndarray:
        cfg = self.model.config
        shape = (count, cfg.input_size, cfg.input_size, cfg.in_channels)
        if isinstance(noise, str):
            return initial_noise(noise, secrets.randbits(32) if seed is None else seed, *shape)
        if seed is not None or noise.shape != shape:
            raise UserError(
                f"expected noise {shape} and no seed, found noise {noise.shape} and seed {seed}"
            )
        return np.asarray(noise, np.float32)


@functools.partial(jax.jit, static_argnames="edm")
def _start(noise: Array, *, edm: EdmConfig) -> HeunState:
    return diffusion.heun_start(noise, edm)


_denoised = jax.jit(diffusion.heun_denoised)
