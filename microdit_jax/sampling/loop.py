"""The loop around the compiled programs: batches of captions and noise to latents."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.machine import memory
from microdit_jax.machine.placement import fetch, full_batches, put_rows, round_up, rows_sharding
from microdit_jax.models.dit import DiT
from microdit_jax.sampling import programs
from microdit_jax.sampling.guidance import Form
from microdit_jax.sampling.settings import Sampler

# Wraps the sequence of network evaluations, as tqdm does.
Progress = Callable[[Sequence[Any]], Iterable[Any]]
# Called with the position of a batch's first image among those asked for, the step from 0, and what
# the network makes of the noise so far: scaled latents (m, h, w, channels) of the batch's images.
Preview = Callable[[int, int, Float[np.ndarray, "m h w c"]], None]


class LatentBatch(NamedTuple):
    """Latents that were sampled together: their rows, (m, h, w, channels), and seconds by part."""

    rows: slice
    latents: Float[np.ndarray, "m h w c"]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerLoop:
    """A network as compiled programs, which are kept in `compiled`, and the loop that runs them.

    Attributes:
      compiled: programs by batch size, caption length and number of captions for each image; the
        caller's, so that networks of the same shapes share them.
    """

    model: DiT
    params: Any
    edm: EdmConfig
    compiled: dict

    def programs(
        self, batch_size: int, caption_length: int, form: Form
    ) -> tuple[int, Callable, Callable]:
        """`encode_captions` and `evaluate_network`, compiled once for each shape and form.

        Args:
          batch_size: images sampled at a time; on a mesh, rounded up to its number of devices.
        Returns:
          The size of a batch, and the two programs.
        Raises:
          UserError: they need more memory than there is.
        """
        size = round_up(batch_size, rows_sharding(self.params)[1])
        form = Form.CONDITIONAL if form == Form.UNCONDITIONAL else form  # the same program
        key = (size, caption_length, form.value)
        if key not in self.compiled:
            self.compiled[key] = programs.compile_programs(
                self.model, self.edm, self.params, size, caption_length, form=form
            )
        return size, *self.compiled[key]

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
        inputs: Callable[[slice], tuple[np.ndarray, np.ndarray]],
        sampler: Sampler,
        *,
        unconditional: Float[np.ndarray, "other caption"] | None = None,
        batch_size: int,
        progress: Progress | None = None,
        preview: Preview | None = None,
    ) -> Iterator[LatentBatch]:
        """Samples the latents of `count` images, batch by batch.

        Args:
          inputs: caption embeddings (m, l, caption) and noise (m, h, w, channels) of a batch.
          unconditional: embedding of the negative prompt; None: zeros.
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
            rows = slice(start, start + found)
            with timed(seconds, "text"):
                y, x = inputs(rows)
                texts = {form: _captions(y, unconditional, form)[filled - start] for form in forms}
            with timed(seconds, "compiling"):
                compiled = {form: self.programs(size, y.shape[1], form)[1:] for form in forms}
            with timed(seconds, "sampling"), memory.out_of_memory(f"a batch_size below {size}"):
                captions = {
                    form: encode(self.params, put_rows(_flat(texts[form]), row_sharding))
                    for form, (encode, _) in compiled.items()
                }
                state = programs.start(put_rows(x[filled - start], row_sharding), edm=self.edm)
                for at, form, strength, step in plan:
                    next(ticks)
                    _, evaluate = compiled[form]
                    state = evaluate(self.params, captions[form], state, at, strength)
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
