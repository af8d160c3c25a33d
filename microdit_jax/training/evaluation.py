"""What training is measured by: loss on held-out pictures at fixed noise, a grid of samples."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Float64, Int
from ml_collections import ConfigDict

from microdit_jax import sharding
from microdit_jax.assets import load
from microdit_jax.data.pipeline import Source
from microdit_jax.diffusion import EdmConfig
from microdit_jax.encoders.known_texts import KnownTexts
from microdit_jax.errors import UserError
from microdit_jax.evaluate.in_training import TrainingScores
from microdit_jax.evaluate.prompts import read_prompts
from microdit_jax.images import captioned_grid, save_png
from microdit_jax.machine import hosts
from microdit_jax.models.dit import DiT
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.training import report
from microdit_jax.training import step as train_step
from microdit_jax.training.caption_tower import CaptionTower, batch_key
from microdit_jax.training.data import RunData
from microdit_jax.training.metric_writer import MetricWriter
from microdit_jax.training.step import TrainState

# The noise is the same at every evaluation of every run, whatever its own seed.
NOISE_SEED = 0x4E1D
# Levels of noise that losses are told for: this many, half a P_std apart in ln sigma.
NUM_SIGMAS = 9


def sigma_levels(edm: EdmConfig) -> Float64[np.ndarray, " levels"]:
    """The levels, (NUM_SIGMAS,) float64, the middle one at exp(P_mean)."""
    half = NUM_SIGMAS // 2
    return np.exp(edm.P_mean + edm.P_std * np.arange(-half, half + 1) / 2)


def nearest_level(sigma: Float[Array, " n"], edm: EdmConfig) -> Int[Array, " n"]:
    """Of each sigma the level next to it in ln sigma; the outermost hold what lies beyond."""
    half = NUM_SIGMAS // 2
    steps = jnp.round((jnp.log(sigma) - edm.P_mean) / edm.P_std * 2)
    return jnp.clip(steps.astype(jnp.int32), -half, half) + half


class HeldoutLoss:
    """Loss on held-out pictures with their own captions, and with those of other pictures.

    A network that ignores its captions has a ratio of 1; the lower, the more it follows them.

    Args:
      num_images: how many, spread evenly over the source.
      batch_size: images at a time, of all processes together.
      draws: noise draws for each image.
      tower: embeds the captions of a source of token ids.
    """

    def __init__(
        self,
        model: DiT,
        edm: EdmConfig,
        mesh: Mesh,
        source: Source,
        *,
        num_images: int,
        batch_size: int,
        draws: int,
        tower: CaptionTower | None = None,
    ):
        self._source, self._draws, self._mesh = source, draws, mesh
        self._levels = sigma_levels(edm)
        self._captions = batch_key(tower)
        self._tower_params = None if tower is None else tower.params
        count = min(num_images, len(source))
        self._chosen = np.linspace(0, len(source) - 1, count).astype(int)
        # Filled up to whole batches of one size that divides over the devices.
        self._size = -(-min(batch_size, count) // mesh.size) * mesh.size
        loss = train_step.make_eval_step(model, edm=edm, seed=NOISE_SEED, mesh=mesh)

        def summed(params, tower_params, batch):
            images = {name: value for name, value in batch.items() if name != "weight"}
            if tower is not None:
                images = tower.embed(tower_params, images)
            losses, sigma = loss(params, images)
            place = jax.nn.one_hot(nearest_level(sigma, edm), NUM_SIGMAS)
            return batch["weight"] @ (losses[:, None] * place), batch["weight"] @ place

        self._summed = jax.jit(summed)

    def __call__(self, params: Any) -> dict[str, Any]:
        """Mean losses; all processes call it.

        Returns:
          "right" and "shuffled", their "ratio", and "by_sigma", the loss with the right captions by
          level of noise, {"0.549": loss, ...}; NaN for a level that no draw came near.
        """
        sums = {"right": [], "shuffled": []}
        for number, (batch, weight) in enumerate(self._batches()):
            for i in range(self._draws):
                draw = {"draw": np.uint32(number * self._draws + i)}
                for captions, losses in sums.items():
                    part = {"latents": batch["latents"], self._captions: batch[captions]}
                    placed = sharding.put_batch(part | draw | {"weight": weight}, self._mesh)
                    losses.append(self._summed(params, self._tower_params, placed))
        found = {name: np.sum(jax.device_get(parts), axis=0) for name, parts in sums.items()}
        means = {name: float(total.sum() / count.sum()) for name, (total, count) in found.items()}
        with np.errstate(invalid="ignore"):
            by_level = np.divide(*found["right"])
        by_sigma = {f"{s:.3g}": float(x) for s, x in zip(self._levels, by_level, strict=True)}
        return means | {"ratio": means["right"] / means["shuffled"], "by_sigma": by_sigma}

    def _batches(self) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """This process's rows of each batch, and 1 for each image, 0 for what fills up."""
        count, half = len(self._chosen), len(self._chosen) // 2
        local = self._size // jax.process_count()
        for start in range(0, count, self._size):
            rows = start + jax.process_index() * local + np.arange(local)
            images = [self._source[int(self._chosen[row % count])] for row in rows]
            others = [self._source[int(self._chosen[(row + half) % count])] for row in rows]
            yield (
                {
                    "latents": np.stack([record["latents"] for record in images]),
                    "right": np.stack([record[self._captions] for record in images]),
                    "shuffled": np.stack([record[self._captions] for record in others]),
                },
                (rows < count).astype(np.float32),
            )


class Evaluation:
    """Evaluates a run, raw weights and moving average, and records what came out.

    Args:
      writer: None on processes that do not write.
      say: prints a line.
    Raises:
      UserError: a tower that is not there.
    """

    def __init__(
        self,
        model: DiT,
        edm: EdmConfig,
        mesh: Mesh,
        data: RunData,
        config: ConfigDict,
        workdir: Path,
        writer: MetricWriter | None,
        say: Callable[[str], None],
    ):
        settings = config.eval
        self._loss = HeldoutLoss(
            model,
            edm,
            mesh,
            data.heldout,
            num_images=settings.num_images,
            batch_size=settings.batch_size,
            draws=settings.draws,
            tower=data.tower,
        )
        self._grid = self._scores = None
        if settings.num_samples or settings.score_images:
            encoder = load.load_text_encoder(config.data.text_encoder)
            codec = None
            if jax.process_index() == 0:
                codec = load.load_codec(str(data.codec or config.data.vae))
            pipe = LatentDiffusion(model, None, edm, encoder, codec)
            if settings.num_samples:
                self._grid = Grid(pipe, data, config)
            if settings.score_images:
                self._scores = SampleScores(pipe, data, config, workdir)
            # One process may have converted towers for minutes, or measured real pictures, and the
            # next exchange waits for half a one.
            hosts.barrier("prepare samples", timeout_seconds=hosts.WORK_SECONDS)
        self._workdir, self._attribution = workdir, data.attribution
        self._writer, self._say = writer, say

    def losses(self, step: int, state: TrainState) -> None:
        """Held-out losses, as one line of the records; all processes call it."""
        kinds = {"raw": state.params} | ({} if state.ema is None else {"ema": state.ema})
        losses = {kind: self._loss(params) for kind, params in kinds.items()}
        if self._writer is not None:
            self._writer.write(step, {"heldout": losses})
        for kind, found in losses.items():
            self._say(
                f"step {step}: held-out loss of the {kind} weights {found['right']:.4f} with right "
                f"captions, {found['shuffled']:.4f} with shuffled ones, ratio {found['ratio']:.3f}"
            )

    def grid(self, step: int, state: TrainState) -> None:
        """Samples of the average, where one is kept, as samples/step_*.png, and their scores.

        The run's page, report.html, is written anew. All processes call it. Where no samples can be
        drawn, the log says why, and training goes on.
        """
        params = state.params if state.ema is None else state.ema
        for draw in (self._write_scores, self._write_sheet):
            try:
                draw(step, params)
            except UserError as error:  # before the step is saved: each restart would end so
                self._say(f"step {step}: no samples: {error}")
        if self._writer is not None:
            report.write([self._workdir], self._workdir / "report.html")

    def _write_scores(self, step: int, params: Any) -> None:
        scores = None if self._scores is None else self._scores(params)
        if self._writer is not None and scores is not None:
            self._writer.write(step, {"samples": scores})
            said = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self._say(f"step {step}: samples against real pictures: {said}")

    def _write_sheet(self, step: int, params: Any) -> None:
        image = None if self._grid is None else self._grid(params)
        if self._writer is not None and image is not None:
            about = {"step": step, "attribution": self._attribution}
            save_png(self._workdir / "samples" / f"step_{step:07d}.png", image, about)
            self._writer.image(step, "samples", image)


def _with_texts(pipe: LatentDiffusion, texts: list[str]) -> LatentDiffusion:
    """The same pipeline, compiled programs included, for these texts alone."""
    return dataclasses.replace(pipe, text_encoder=KnownTexts(pipe.text_encoder, texts))


class Grid:
    """Samples for the same captions and noise at every evaluation.

    The captions are the config's prompts, or, where it has none, held-out captions, each sample
    then beside the real picture as decoded from its latents. The text encoder is needed once, here;
    the codec stays, on the process that writes.

    Args:
      pipe: without weights; its programs are compiled once for all evaluations.
    """

    def __init__(self, pipe: LatentDiffusion, data: RunData, config: ConfigDict):
        self._settings, self._seed = config.eval, config.seed
        self._real, count = None, config.eval.num_samples
        if config.eval.prompts:
            self._captions = list(config.eval.prompts[:count])
        else:
            chosen = np.linspace(0, len(data.heldout) - 1, min(count, len(data.heldout)))
            self._captions = [data.heldout_caption(int(i)) for i in chosen]
            self._real = np.stack([data.heldout[int(i)]["latents"] for i in chosen])
        self._pipe = _with_texts(pipe, self._captions)

    def __call__(self, params: Any) -> Float32[np.ndarray, "H W 3"] | None:
        """The grid (H, W, 3) in [0, 1], on process 0; all processes call it."""
        pipe = dataclasses.replace(self._pipe, params=params)
        latents = pipe.generate(
            self._captions,
            guidance_scale=self._settings.guidance_scale,
            num_inference_steps=self._settings.num_inference_steps,
            seed=self._seed,
            return_only_latents=True,
        )
        if pipe.codec is None:
            return None
        shown = [latents] if self._real is None else [self._real, latents]
        rows = [pipe.decode(row) for row in shown]
        return captioned_grid(rows, self._captions, columns=6 if len(rows) == 2 else 8)


class SampleScores:
    """Distance of samples to real pictures in small features, at every evaluation.

    Args:
      pipe: as `Grid` takes it.
    Raises:
      UserError: no such prompts or pictures.
    """

    def __init__(self, pipe: LatentDiffusion, data: RunData, config: ConfigDict, workdir: Path):
        settings = config.eval
        prompts = read_prompts(settings.score_prompts, settings.score_images).texts
        self._pipe, resolution = _with_texts(pipe, prompts), 0
        if pipe.codec is not None:
            resolution = pipe.model.config.input_size * pipe.codec.pixels_per_latent
        self._scores = TrainingScores(
            prompts,
            settings.score_reference if pipe.codec is not None else "",
            workdir / "references",
            resolution=resolution,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            seed=config.seed,
        )

    def __call__(self, params: Any) -> dict[str, float] | None:
        """The scores, on process 0; all processes call it."""
        return self._scores(dataclasses.replace(self._pipe, params=params))
