"""Time per step of the training loop over that of the bare jitted step.

  python -m benchmarks.loop_overhead --stage=pretrain --processes=6

The loop is `train` itself on the demo's configuration: data, progress, metrics.jsonl, TensorBoard,
and a checkpoint every 50 steps. After every 50 of its steps, in place of an evaluation, the same
compiled step runs 50 times on one batch that is on the devices already. Taking turns, both see the
same machine. Where it is shared, the processor time of both says more than the clock: on a CPU,
which computes and does everything else, it bounds what the loop adds.

Two states of one process, at their different places in memory, differ by 5 % in speed, for as long
as the process lives: so this repeats in several, and takes the median of theirs.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("benchmarks.loop_overhead")

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tqdm
from absl import flags
from ml_collections import ConfigDict

from configs import demo
from microdit_jax import sharding
from microdit_jax.commands.cli import absl_command
from microdit_jax.train import train
from microdit_jax.training import step as train_step
from microdit_jax.training.config import make_optimizer, make_step
from microdit_jax.training.evaluation import EVALUATORS, Entry
from microdit_jax.training.evaluators.base import EvaluationContext
from microdit_jax.training.metric_writer import read_metrics

STEPS = flags.DEFINE_integer(
    "steps", 250, "Steps of the loop, and as many bare ones.", lower_bound=100
)
PROCESSES = flags.DEFINE_integer("processes", 6, "One after another.", lower_bound=1)
STAGE = flags.DEFINE_string("stage", "pretrain", "Stage of the demo: pretrain or finetune.")
EVERY = 50
CLOCKS = ("wall", "processor")


def clocks() -> np.ndarray:
    """Reads the wall clock and this process's processor time, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


class BareSteps:
    """An evaluator that makes as many bare steps as the loop has just made, and times both."""

    at_start = True
    loop: list[np.ndarray] = []
    bare: list[np.ndarray] = []

    def __init__(self, context: EvaluationContext):
        config, mesh = context.config, context.mesh
        optimizer, schedule = make_optimizer(config)
        self._step = make_step(config, context.model, optimizer, schedule, mesh)
        self._state = train_step.sharded_init(
            context.model, optimizer, jax.random.key(0), mesh, with_ema=config.ema.enabled
        )
        record = next(context.data.batches(config, 0))
        batch = {name: record[name] for name in context.data.batch_keys}
        self._batch = sharding.put_batch(batch, mesh)
        self._left = clocks()

    def run(self, step: int, state: train_step.TrainState) -> None:
        """Times the loop's last steps and then as many bare ones; the first call only warms up."""
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


@absl_command()
def main():
    if PROCESSES.value == 1:
        print(json.dumps(measure(demo.get_config(STAGE.value))))
        return
    command = [sys.executable, "-m", "benchmarks.loop_overhead", "--processes=1"]
    command += [f"--steps={STEPS.value}", f"--stage={STAGE.value}"]
    found = []
    for _ in tqdm.trange(PROCESSES.value, unit="process"):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        tqdm.tqdm.write(json.dumps(found[-1]))
    ratios = {clock: [run[clock]["ratio"] for run in found] for clock in CLOCKS}
    result = {
        clock: {"ratio": np.median(values), "lowest_and_highest": [min(values), max(values)]}
        for clock, values in ratios.items()
    }
    print(json.dumps({"stage": STAGE.value, "processes": PROCESSES.value, **result}, indent=1))


def measure(config: ConfigDict) -> dict:
    """Runs the loop beside the bare step in this process, and compares their times."""
    config.init_from = ""
    config.train.update(
        steps=STEPS.value, log_every=EVERY, eval_every=EVERY, checkpoint_every=EVERY
    )
    EVALUATORS["bare_steps"] = Entry(BareSteps)
    config.eval.evaluators = ("bare_steps",)
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run")
        lines = read_metrics(Path(folder) / "run")
    # The first fifty compile; a checkpoint falls into the fifty steps after it.
    loop, bare = np.array(BareSteps.loop[1:]), np.array(BareSteps.bare[1:])
    result = {
        clock: {
            "ratio": np.median(loop[:, i] / bare[:, i]),
            "loop_seconds_per_step": np.median(loop[:, i]),
            "bare_seconds_per_step": np.median(bare[:, i]),
        }
        for i, clock in enumerate(CLOCKS)
    }
    result["data_wait"] = np.median([line["speed"]["data_wait"] for line in lines[1:]])
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return result | {"device": device, "windows": len(loop), "jax": jax.__version__}
