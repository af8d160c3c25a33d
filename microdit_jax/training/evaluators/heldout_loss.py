"""The loss on held-out images at fixed noise: comparable between all evaluations of all runs."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float64, Int

from microdit_jax import sharding
from microdit_jax.data.pipeline import Source
from microdit_jax.diffusion import EdmConfig
from microdit_jax.machine.placement import full_batches, round_up
from microdit_jax.models.dit import DiT
from microdit_jax.training import step as train_step
from microdit_jax.training.caption_tower import CaptionTower, batch_key
from microdit_jax.training.evaluators.base import EvaluationContext, between
from microdit_jax.training.step import TrainState

# The noise is the same at every evaluation of every run, whatever its own seed.
NOISE_SEED = 0x4E1D
# Noise levels that losses are reported for: this many, half a P_std apart in ln sigma.
NUM_SIGMAS = 9
AHEAD = 2  # programs on the devices before one's result is waited for: a stop waits for these


def sigma_levels(edm: EdmConfig) -> Float64[np.ndarray, " levels"]:
    """Returns the noise levels, (NUM_SIGMAS,) float64, the middle one at exp(P_mean)."""
    half = NUM_SIGMAS // 2
    return np.exp(edm.P_mean + edm.P_std * np.arange(-half, half + 1) / 2)


def nearest_level(sigma: Float[Array, " n"], edm: EdmConfig) -> Int[Array, " n"]:
    """Returns the index of the level nearest to each sigma in ln sigma.

    A sigma beyond the outermost levels belongs to the outermost.
    """
    half = NUM_SIGMAS // 2
    steps = jnp.round((jnp.log(sigma) - edm.P_mean) / edm.P_std * 2)
    return jnp.clip(steps.astype(jnp.int32), -half, half) + half


class HeldoutLoss:
    """Computes the loss of held-out images with their own captions, and with those of others.

    The ratio of the two is 1 for a network that ignores its captions, and falls the more it follows
    them.

    Args:
      num_images: images to use, spread evenly over the source.
      batch_size: images at a time, over all processes.
      noise_samples: noise samples for each image.
      tower: embeds the captions of a source of token ids.
      check: called before each noise sample of a batch; may leave by an exception.
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
        noise_samples: int,
        tower: CaptionTower | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self._check = check
        self._source, self._noise_samples, self._mesh = source, noise_samples, mesh
        self._levels = sigma_levels(edm)
        self._captions = batch_key(tower)
        self._tower_params = None if tower is None else tower.params
        count = min(num_images, len(source))
        self._chosen = np.linspace(0, len(source) - 1, count).astype(int)
        self._size = round_up(min(batch_size, count), mesh.size)
        loss = train_step.make_eval_step(model, edm=edm, seed=NOISE_SEED, mesh=mesh)

        def weighted_sums(params, tower_params, batch):
            """Sums losses and weights of a batch by noise level, (levels,) each."""
            images = {name: value for name, value in batch.items() if name != "weight"}
            if tower is not None:
                images = tower.embed(tower_params, images)
            losses, sigma = loss(params, images)
            level = jax.nn.one_hot(nearest_level(sigma, edm), NUM_SIGMAS)  # (n, levels)
            return batch["weight"] @ (losses[:, None] * level), batch["weight"] @ level

        self._weighted_sums = jax.jit(weighted_sums)

    def __call__(self, params: Any) -> dict[str, Any]:
        """Computes the mean losses; all processes call it.

        Returns:
          "right" and "shuffled", their "ratio", and "by_sigma", the loss with the right captions by
          noise level, {"0.549": loss, ...}; NaN for a level that no noise sample came near.
        """
        sums = {"right": [], "shuffled": []}
        running: deque[Any] = deque()
        for number, batch in enumerate(self._batches()):
            for i in between(range(self._noise_samples), self._check):
                sample = {"draw": np.asarray(number * self._noise_samples + i, np.uint32)}
                for captions, found in sums.items():
                    part = {"latents": batch["latents"], self._captions: batch[captions]}
                    part |= sample | {"weight": batch["weight"]}
                    placed = sharding.put_batch(part, self._mesh)
                    found.append(self._weighted_sums(params, self._tower_params, placed))
                    # Hundreds of collectives at a time lock up devices that are CPUs.
                    running.append(found[-1])
                    if len(running) > AHEAD:
                        jax.block_until_ready(running.popleft())
        totals = {name: np.sum(jax.device_get(parts), axis=0) for name, parts in sums.items()}
        means = {name: float(loss.sum() / count.sum()) for name, (loss, count) in totals.items()}
        with np.errstate(invalid="ignore"):
            by_level = np.divide(*totals["right"])
        by_sigma = {f"{s:.3g}": float(x) for s, x in zip(self._levels, by_level, strict=True)}
        return means | {"ratio": means["right"] / means["shuffled"], "by_sigma": by_sigma}

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's rows of each batch, with "weight" 0 for what fills it up.

        The shuffled captions are those of the image half the set further on.
        """
        chosen, half = self._chosen, len(self._chosen) // 2
        local = self._size // jax.process_count()
        mine = slice(jax.process_index() * local, (jax.process_index() + 1) * local)
        for batch in full_batches(len(chosen), self._size):
            rows = batch.rows[mine]
            images = [self._source[int(chosen[row])] for row in rows]
            others = [self._source[int(chosen[(row + half) % len(chosen)])] for row in rows]
            new = np.arange(self._size)[mine] < batch.count
            yield {
                "latents": np.stack([record["latents"] for record in images]),
                "right": np.stack([record[self._captions] for record in images]),
                "shuffled": np.stack([record[self._captions] for record in others]),
                "weight": new.astype(np.float32),
            }


class HeldoutLossEvaluator:
    """Records the held-out loss of the raw weights, and of their moving average if one is kept."""

    at_start = True

    def __init__(self, context: EvaluationContext):
        self._context, settings = context, context.config.eval
        self._loss = HeldoutLoss(
            context.model,
            context.edm,
            context.mesh,
            context.data.heldout,
            num_images=settings.num_images,
            batch_size=settings.batch_size,
            noise_samples=settings.draws,
            tower=context.data.tower,
            check=context.check,
        )

    def run(self, step: int, state: TrainState) -> None:
        """Writes one line to metrics.jsonl, {"heldout": {"raw": ..., "ema": ...}}."""
        kinds = {"raw": state.params} | ({} if state.ema is None else {"ema": state.ema})
        losses = {kind: self._loss(params) for kind, params in kinds.items()}
        if self._context.writer is not None:
            self._context.writer.write(step, {"heldout": losses})
        for kind, found in losses.items():
            self._context.say(
                f"step {step}: held-out loss of the {kind} weights {found['right']:.4f} with right "
                f"captions, {found['shuffled']:.4f} with shuffled ones, ratio {found['ratio']:.3f}"
            )
