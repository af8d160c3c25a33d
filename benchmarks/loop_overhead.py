"""Time per step of the training loop over that of the bare jitted step.

  python -m benchmarks.loop_overhead --steps=500

The loop is `train` itself on the demo's configuration: data, progress, metrics.jsonl, TensorBoard,
and a checkpoint every 50 steps. After every 50 of its steps, in place of an evaluation, the same
compiled step runs 50 times on one batch that is on the devices already. Taking turns, both see the
same machine. Where it is shared, the processor time of both says more than the clock: on a CPU,
which computes and does everything else, it bounds what the loop adds.
"""

import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from configs import demo
from microdit_jax import sharding, train_step
from microdit_jax import train as train_module
from microdit_jax.cli import run
from microdit_jax.metric_writer import read_metrics
from microdit_jax.run_config import make_optimizer, make_step

STEPS = flags.DEFINE_integer("steps", 500, "Steps of the loop, and as many bare ones.")
STAGE = flags.DEFINE_string("stage", "pretrain", "Of the demo: pretrain or finetune.")
EVERY = 50


def clocks() -> np.ndarray:
    """Seconds by the wall clock, and of processor time of this process."""
    return np.array([time.perf_counter(), time.process_time()])


class BareSteps:
    """Stands in for the evaluation: as many bare steps as the loop has just made, by the clocks."""

    loop: list[np.ndarray] = []
    bare: list[np.ndarray] = []

    def __init__(self, model, edm, mesh, data, config, workdir, writer, say):
        optimizer, schedule = make_optimizer(config)
        self._step = make_step(config, model, optimizer, schedule, mesh)
        self._state = train_step.sharded_init(
            model, optimizer, jax.random.key(0), mesh, with_ema=config.ema.enabled
        )
        record = next(data.batches(config, 0))
        batch = {name: record[name] for name in data.batch_keys}
        self._batch = sharding.put_batch(batch, mesh)

    def losses(self, step, state):
        jax.block_until_ready(state)
        begin = clocks()
        if step:
            self.loop.append((begin - self._left) / EVERY)
        for _ in range(EVERY):
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        self._left = clocks()
        if step:
            self.bare.append((self._left - begin) / EVERY)

    def grid(self, step, state):
        pass


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    config = demo.get_config(STAGE.value)
    config.init_from = ""
    config.train.update(
        steps=STEPS.value, log_every=EVERY, eval_every=EVERY, checkpoint_every=EVERY
    )
    train_module.Evaluation = BareSteps
    with tempfile.TemporaryDirectory() as folder:
        train_module.train(config, Path(folder) / "run")
        lines = read_metrics(Path(folder) / "run")
    # The first fifty compile; a checkpoint falls into the fifty steps after it.
    loop, bare = np.array(BareSteps.loop[1:]), np.array(BareSteps.bare[1:])
    result = {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
    for i, clock in enumerate(("wall", "processor")):
        ratios = loop[:, i] / bare[:, i]
        result[clock] = {
            "loop_seconds_per_step": np.median(loop[:, i]),
            "bare_seconds_per_step": np.median(bare[:, i]),
            "ratio": np.median(ratios),
            "lowest_and_highest": [ratios.min(), ratios.max()],
        }
    result["data_wait"] = np.median([line["speed"]["data_wait"] for line in lines[1:]])
    result |= {"windows": len(loop), "steps_in_a_window": EVERY, "jax": jax.__version__}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main)
