"""Follows a run's steps a little behind the devices, so that reading results never stalls them."""

import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from microdit_jax.errors import LONGEST, UserError, visible
from microdit_jax.files import disk_errors
from microdit_jax.machine.placement import fetch
from microdit_jax.training.goodput import Goodput
from microdit_jax.training.metric_writer import MetricWriter

# Steps dispatched to the devices before the results of an earlier one are read
AHEAD = 2


class Progress:
    """Shows progress, writes the training lines of metrics.jsonl, and reports skipped updates.

    Args:
      writer: None on processes that do not write.
      goodput: counts what the time is spent on.
      start, total: the step this command starts from, and the run's last.
      resumed: `metadata` of the step that the run resumes from; {} at the start of a stage.
      max_skipped: updates in a row that may be skipped.
      images_per_step: images of a batch, over all devices.
      flops_per_image: FLOPs of training on one image.
      peak_flops: peak FLOP/s of one device; None if unknown: then no MFU is reported.
      dataset_names: names by the number in "source" of each record.
    """

    def __init__(
        self,
        workdir: Path,
        writer: MetricWriter | None,
        goodput: Goodput,
        *,
        start: int,
        total: int,
        resumed: Mapping[str, Any],
        log_every: int,
        max_skipped: int,
        images_per_step: int,
        flops_per_image: int,
        peak_flops: float | None,
        dataset_names: list[str],
    ):
        self._workdir, self._writer, self._goodput = workdir, writer, goodput
        self._total = total
        self._log_every, self._max_skipped = log_every, max_skipped
        self._images_per_step, self._names = images_per_step, dataset_names
        self._flops_per_step_and_device = flops_per_image * images_per_step / jax.device_count()
        self._peak_flops = peak_flops
        # Losses since the last line, and updates skipped since the stage began. Both are saved in
        # checkpoints, so that a resumed run writes the same lines as an unbroken one.
        self._window: list[float | None] = list(resumed.get("window", []))
        self._skipped: int = resumed.get("skipped", 0)
        self._pending: deque[tuple[int, dict, dict]] = deque()
        self._bar = tqdm.tqdm(
            total=total, initial=start, desc=workdir.name, unit="step", dynamic_ncols=True,
            disable=None if writer else True,
        )  # fmt: skip
        self._restart_clock()

    def metadata(self) -> dict[str, Any]:
        """Returns what a checkpoint must hold for a resume; call `catch_up` first."""
        return {"window": list(self._window), "skipped": self._skipped}

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Times the wait for a batch."""
        begin = time.perf_counter()
        with self._goodput.spent_on("data"):
            yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Leaves the time of evaluations and the like out of the throughput.

        Args:
          kind: one of `goodput.KINDS`.
        """
        begin = time.perf_counter()
        with self._goodput.spent_on(kind):
            yield
        self._since += time.perf_counter() - begin

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Times the first step, whose call returns once it is compiled."""
        begin = time.perf_counter()
        with self.paused("compile"):
            yield
        self.say(f"compiled the training step in {time.perf_counter() - begin:.0f} s")

    def push(self, step: int, metrics: Mapping[str, Any], names: Mapping[str, np.ndarray]) -> None:
        """Notes a step that was just dispatched to the devices.

        Args:
          metrics: results of the train step, not computed yet.
          names: "source" and "index" of this process's records.
        Raises:
          UserError: too many updates in a row were skipped.
        """
        self._pending.append((step, dict(metrics), dict(names)))
        while len(self._pending) > AHEAD:
            self._collect(*self._pending.popleft())

    def catch_up(self) -> None:
        """Waits for every step so far and writes its line."""
        while self._pending:
            self._collect(*self._pending.popleft())

    def say(self, message: str) -> None:
        """Prints a line above the progress line, on the process that writes."""
        if self._writer is not None:
            tqdm.tqdm.write(visible(message, LONGEST))

    def close(self) -> None:
        """Ends the progress line."""
        self._bar.close()

    def _restart_clock(self) -> None:
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def _collect(self, step: int, metrics: dict, where: dict[str, np.ndarray]) -> None:
        # Each transfer takes 0.1 ms, jax.device_get three times that: so only these two are read
        # at every step, and the others when a line is written.
        loss, skipped = np.asarray(metrics["loss"]), np.asarray(metrics["skipped"])
        self._steps += 1
        self._goodput.step_done(step)
        if skipped:
            self._skipped += 1
            self._window.append(None)
            self._report_skipped(step, metrics, where, int(metrics["skipped_in_a_row"]))
        else:
            self._window.append(float(loss))
        self._bar.update()
        if step % self._log_every == 0 or step == self._total:
            self._log(step, metrics)

    def _log(self, step: int, metrics: Mapping[str, Any]) -> None:
        losses = [loss for loss in self._window if loss is not None]
        line = {
            "loss": float(np.mean(losses)) if losses else None,
            "grad_norm": float(metrics["grad_norm"]),
            "learning_rate": float(metrics["learning_rate"]),
            "skipped": self._skipped,
        }
        if module_norms := metrics.get("module_grad_norm"):
            norms = jax.device_get(module_norms)
            line["module_grad_norm"] = {name: float(norm) for name, norm in norms.items()}
        line["speed"] = self._speed(step)
        self._window = []
        self._restart_clock()
        if self._writer is None:
            return
        self._writer.write(step, line)
        text = describe(line)
        self._bar.set_postfix_str(text)
        if self._bar.disable:  # not a terminal: a line instead of a bar
            left = time.strftime("%H:%M:%S", time.gmtime(line["speed"]["seconds_left"] % 86400))
            days = int(line["speed"]["seconds_left"] // 86400)
            print(f"step {step}/{self._total}: {text}, {days} d {left} left", flush=True)

    def _speed(self, step: int) -> dict[str, float]:
        """Returns throughput and shares of time, the only values that differ in equal runs."""
        seconds = (time.perf_counter() - self._since) / self._steps
        speed = {
            "images_per_second": self._images_per_step / seconds,
            "seconds_per_step": seconds,
            "tflops_per_device": self._flops_per_step_and_device / seconds / 1e12,
            "data_wait": self._waited / (seconds * self._steps),
            "seconds_left": seconds * (self._total - step),
        }
        if self._peak_flops is not None:
            speed["mfu"] = speed["tflops_per_device"] * 1e12 / self._peak_flops
        return speed | self._goodput.figures()

    def _report_skipped(
        self, step: int, metrics: dict, where: dict[str, np.ndarray], in_a_row: int
    ) -> None:
        """Records the images of a skipped update in nonfinite/, and ends the run after too many."""
        images = {name: fetch(metrics[f"image_{name}"]) for name in ("loss", "sigma")}
        if jax.process_count() > 1:
            where = multihost_utils.process_allgather(where, tiled=True)
        path = self._workdir / "nonfinite" / f"step_{step}.json"
        bad = np.flatnonzero(~np.isfinite(images["loss"]))
        if self._writer is not None:
            contents = {
                "step": step,
                "grad_norm": repr(float(metrics["grad_norm"])),
                "images_not_finite": bad.tolist(),
                "dataset": [self._names[i] for i in where["source"]],
                "index": np.asarray(where["index"]).tolist(),
                "sigma": images["sigma"].astype(float).tolist(),
                "loss": [repr(float(loss)) for loss in images["loss"]],
            }
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(contents, indent=1) + "\n")
        sets = Counter(self._names[where["source"][i]] for i in bad)
        self.say(
            f"step {step}: not finite, update skipped ({in_a_row} in a row, {self._skipped} in "
            f"all); {len(bad)} images' losses {dict(sets) if sets else ''}; see {path}"
        )
        if in_a_row >= self._max_skipped:
            raise UserError(
                f"expected finite losses and gradients, found none in {in_a_row} steps in a row up "
                f"to step {step}; look at {path.parent}, then start the same command with a lower "
                "optim.learning_rate or clip_norm, or without the data named there"
            )


def describe(line: Mapping[str, Any]) -> str:
    """Summarises a training line of metrics.jsonl in a few words."""
    speed = line["speed"]
    loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
    words = [
        f"loss {loss}",
        f"lr {line['learning_rate']:.1e}",
        f"grad {line['grad_norm']:.2f}",
        f"{speed['images_per_second']:,.0f} images/s",
        f"{speed['tflops_per_device']:.3g} TFLOP/s each",
    ]
    if "mfu" in speed:
        words.append(f"MFU {speed['mfu']:.1%}")
    words.append(f"data wait {speed['data_wait']:.0%}")
    if line["skipped"]:
        words.append(f"{line['skipped']} skipped")
    return ", ".join(words)
