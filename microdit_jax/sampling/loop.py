"""The loop around the compiled programs: batches of captions and noise to latents."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32

from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.machine import memory
from microdit_jax.machine.placement import fetch, full_batches, put_rows, round_up, rows_sharding
from microdit_jax.models.dit import DiT
from microdit_jax.sampling import programs
from microdit_jax.sampling.editing import Edit
from microdit_jax.sampling.guidance import Form
from microdit_jax.sampling.programs import Known, SamplerState
from microdit_jax.sampling.settings import Sampler

# Wraps the sequence of network evaluations, as tqdm does.
Progress = Callable[[Sequence[Any]], Iterable[Any]]
# Called with the position of a batch's first image among those asked for, the step from 0, and what
# the network makes of the noise so far: scaled latents (m, h, w, channels) of the batch's images.
Preview = Callable[[int, int, Float[np.ndarray, "m h w c"]], None]


# Noise (m, h, w, channels) that is added before an evaluation to the images of a batch: called with
# their rows and the number of the evaluation.
AddedNoise = Callable[[slice, int], Float32[np.ndarray, "m h w c"]]


class BatchInputs(NamedTuple):
    """Inputs of the images of a batch.

    Attributes:
      captions: embeddings.
      noise: standard normal.
      latents: scaled, of images that are to be changed; None: there are none.
      free: 1 where such an image is changed, 0 where it stays; None: everywhere 1.
    """

    captions: Float[np.ndarray, "m l caption"]
    noise: Float[np.ndarray, "m h w c"]
    latents: Float[np.ndarray, "m h w c"] | None = None
    free: Float[np.ndarray, "m h w 1"] | None = None

    @classmethod
    def of(
        cls,
        captions: Float[np.ndarray, "m l caption"],
        noise: Float[np.ndarray, "m h w c"],
        edit: Edit | None,
    ) -> "BatchInputs":
        """Returns the inputs of images that are all made from one, or from noise alone."""
        if edit is None:
            return cls(captions, noise)
        latents = np.repeat(edit.latents[None], len(noise), axis=0)
        free = None if edit.free is None else np.repeat(edit.free[None], len(noise), axis=0)
        return cls(captions, noise, latents, free)


class LatentBatch(NamedTuple):
    """Latents that were sampled together: their rows, (m, h, w, channels), and seconds by part."""

    rows: slice
    latents: Float[np.ndarray, "m h w c"]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerLoop:
    """A network as compiled programs, which are kept in `compiled`, and the loop that runs them.

    Attributes:
      compiled: programs by batch size, caption length and form; the caller's, so that networks
        of the same shapes share them.
      weaker: weights of a network that was trained less, for autoguidance.
    """

    model: DiT
    params: Any
    edm: EdmConfig
    compiled: dict
    weaker: Any = None

    def programs(
        self, batch_size: int, caption_length: int, form: Form, *, edits: bool = False
    ) -> tuple[int, Callable, Callable]:
        """`encode_captions` and `evaluate_network`, compiled once for each shape and form.

        Args:
          batch_size: images sampled at a time; on a mesh, rounded up to its number of devices.
          edits: parts of given images stay.
        Returns:
          The size of a batch, and the two programs.
        Raises:
          UserError: they need more memory than there is.
        """
        size = round_up(batch_size, rows_sharding(self.params)[1])
        form = Form.CONDITIONAL if form == Form.UNCONDITIONAL else form  # the same program
        key = (size, caption_length, f"{form.value}, edited" if edits else form.value)
        if key not in self.compiled:
            self.compiled[key] = programs.compile_programs(
                self.model, self.edm, self._weights(form), size, caption_length, form=form,
                edits=edits,
            )  # fmt: skip
        return size, *self.compiled[key]

    def _weights(self, form: Form) -> Any:
        """Returns the weights that a form's program takes.

        Raises:
          UserError: autoguidance without a weaker network.
        """
        if form != Form.AUTO:
            return self.params
        if self.weaker is None:
            raise UserError(
                "guidance=auto needs a weaker network, found none: an earlier checkpoint of the "
                "same run"
            )
        return {"main": self.params, "weaker": self.weaker}

    def _encoded(self, encode: Callable, captions: jax.Array, form: Form) -> Any:
        """Encodes captions by the networks that a form's program evaluates."""
        if form != Form.AUTO:
            return encode(self.params, captions)
        return {name: encode(part, captions) for name, part in self._weights(form).items()}

    def warm_up(self, batch_size: int, caption_length: int, sampler: Sampler) -> int:
        """Compiles all programs that `run` needs; returns the size of a batch."""
        for form in sampler.forms():
            self.programs(batch_size, caption_length, form)
        row_sharding, devices = rows_sharding(self.params)
        size, cfg = round_up(batch_size, devices), self.model.config
        x = np.zeros((size, cfg.input_size, cfg.input_size, cfg.in_channels), np.float32)
        programs.start(put_rows(x, row_sharding), edm=self.edm)
        return size

    def run(
        self,
        count: int,
        inputs: Callable[[slice], BatchInputs],
        sampler: Sampler,
        *,
        unconditional: Float[np.ndarray, "other caption"] | None = None,
        added: AddedNoise | None = None,
        batch_size: int,
        progress: Progress | None = None,
        preview: Preview | None = None,
    ) -> Iterator[LatentBatch]:
        """Samples the latents of `count` images, batch by batch.

        Args:
          inputs: what the images of a batch are made from.
          unconditional: embedding of the negative prompt; None: zeros.
          added: for samplers that add noise on their way.
          progress, preview: as `Progress` and `Preview` say.
        """
        row_sharding, devices = rows_sharding(self.params)
        size = round_up(batch_size, devices)
        plan = sampler.plan(self.edm)
        forms = {evaluation.form: None for evaluation in plan}  # in the order they come
        batches = list(full_batches(count, size))
        work = range(len(batches) * len(plan))
        ticks = iter(work if progress is None else progress(work))
        for filled, found in batches:
            start, seconds = int(filled[0]), {}
            rows, full = slice(start, start + found), filled - start

            def put(rows: np.ndarray, full: np.ndarray = full) -> jax.Array:
                return put_rows(rows[full], row_sharding)

            with timed(seconds, "text"):
                batch = inputs(rows)
                y, edits = batch.captions, batch.free is not None
                texts = {form: _captions(y, unconditional, form)[full] for form in forms}
            with timed(seconds, "compiling"):
                compiled = {
                    form: self.programs(size, y.shape[1], form, edits=edits)[1:] for form in forms
                }
            with timed(seconds, "sampling"), memory.out_of_memory(f"a batch_size below {size}"):
                captions = {
                    form: self._encoded(encode, put_rows(_flat(texts[form]), row_sharding), form)
                    for form, (encode, _) in compiled.items()
                }
                state = self._start(batch, sampler, put)
                known = None if batch.free is None else _known(batch, put)
                for number, (at, form, strength, step, noise) in enumerate(plan):
                    next(ticks)
                    if noise:
                        assert added is not None
                        state = programs.add_noise(
                            state, put(added(rows, number)), np.float32(noise)
                        )
                    _, evaluate = compiled[form]
                    weights = self._weights(form)
                    state = evaluate(weights, captions[form], state, at, strength, known)
                    if progress is not None:
                        jax.block_until_ready(state)  # or the bar would run ahead of the device
                    if preview is not None and step is not None:
                        preview(start, step, fetch(programs.denoised(state, at))[:found])
                latents = fetch(state.solver.x)[:found]
            if not np.isfinite(latents).all():
                raise UserError(
                    "expected finite latents, found NaN or infinity; check the weights, or use "
                    "dtype='float32' and a lower guidance_scale"
                )
            yield LatentBatch(rows, latents, seconds)
        next(ticks, None)  # a bar ends when it is asked for more

    def _start(
        self, batch: BatchInputs, sampler: Sampler, put: Callable[[np.ndarray], jax.Array]
    ) -> SamplerState:
        """Returns the state before the first evaluation."""
        if batch.latents is None:
            return programs.start(put(batch.noise), edm=self.edm)
        first = np.float32(sampler.levels(self.edm)[0])
        return programs.start_from(put(batch.noise), put(batch.latents), first)


def _known(batch: BatchInputs, put: Callable[[np.ndarray], jax.Array]) -> Known:
    assert batch.latents is not None and batch.free is not None
    return Known(put(batch.latents), put(batch.free))


def _captions(
    y: Float[np.ndarray, "n l caption"],
    unconditional: Float[np.ndarray, "other caption"] | None,
    form: Form,
) -> Float[np.ndarray, "n passes l caption"]:
    """Stacks the captions that a form's program takes for each image."""
    other = np.zeros_like(y[0]) if unconditional is None else unconditional
    if other.shape != y[0].shape:
        raise UserError(
            f"expected prompts of as many tokens as the negative prompt, {len(other)}, "
            f"found {y.shape[1]}"
        )
    without = np.broadcast_to(other, y.shape)
    alone = {Form.CONDITIONAL: y, Form.UNCONDITIONAL: without}
    alone[Form.AUTO] = y
    return np.stack([alone[form]] if form in alone else [y, without], axis=1)


def _flat(texts: Float[np.ndarray, "n passes l caption"]) -> Float[np.ndarray, "m l caption"]:
    """Puts the captions of an image one after another, as `guidance.interleave` does."""
    return texts.reshape(-1, *texts.shape[2:])


@contextlib.contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Measures a part's seconds into `seconds`."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start
