"""Lines, skipped updates and traces of steps that were computed elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from microdit_jax.errors import UserError
from microdit_jax.training import goodput
from microdit_jax.training.goodput import Goodput
from microdit_jax.training.metric_writer import MetricWriter, read_metrics
from microdit_jax.training.progress import AHEAD, Progress, describe

NAMES = {"source": np.array([0, 1]), "index": np.array([7, 8])}


def make_progress(workdir, writer, **changes):
    options = {
        "start": 0, "total": 100, "resumed": {}, "log_every": 2, "max_skipped": 3,
        "images_per_step": 2, "flops_per_image": 10**9, "peak_flops": None,
        "dataset_names": ["cats", "dogs"],
    }  # fmt: skip
    goodput = Goodput(workdir)
    goodput.begin(0)
    return Progress(workdir, writer, goodput, **options | changes)


def metrics_of(loss, in_a_row=0):
    bad = not np.isfinite(loss)
    scalars = {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3}
    return {name: jnp.float32(value) for name, value in scalars.items()} | {
        "skipped": jnp.int32(bad),
        "skipped_in_a_row": jnp.int32(in_a_row),
        "image_loss": jnp.array([1.0, loss], jnp.float32),
        "image_sigma": jnp.array([0.5, 2.0], jnp.float32),
    }


@pytest.fixture
def writer(tmp_path):
    writer = MetricWriter(tmp_path, restored_step=None, tensorboard=False)
    yield writer
    writer.close()


def test_lines_come_late_but_all_of_them(tmp_path, writer):
    progress = make_progress(tmp_path, writer)
    for step, loss in enumerate((1.0, 2.0, 3.0, 4.0), 1):
        progress.push(step, metrics_of(loss), NAMES)
        assert len(read_metrics(tmp_path)) == max(0, step - AHEAD) // 2
    progress.catch_up()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(2, 1.5), (4, 3.5)]
    progress.close()


def test_a_resumed_window_gives_the_same_line(tmp_path, writer):
    first = make_progress(tmp_path, writer, log_every=4)
    for step, loss in ((1, 0.1), (2, np.nan), (3, 0.3)):
        first.push(step, metrics_of(loss, in_a_row=int(step == 2)), NAMES)
    first.catch_up()
    second = make_progress(tmp_path, writer, log_every=4, start=3, resumed=first.metadata())
    second.push(4, metrics_of(0.6), NAMES)
    second.catch_up()
    (line,) = read_metrics(tmp_path)
    assert line["loss"] == np.mean([float(np.float32(loss)) for loss in (0.1, 0.3, 0.6)])
    assert line["skipped"] == 1
    assert second.metadata() == {"window": [], "skipped": 1}


def test_speed_leaves_out_pauses_and_counts_waits(tmp_path, writer, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(goodput, "_counted_until", None)  # whatever trained in this process before
    progress = make_progress(tmp_path, writer, peak_flops=1e9 / 4)

    def spend(seconds):
        now[0] += seconds

    for step in (1, 2):
        with progress.waiting_for_data():
            spend(1)
        spend(3)
        with progress.paused("evaluation"):
            spend(100)
        progress.push(step, metrics_of(1.0), NAMES)
    progress.catch_up()
    (line,) = read_metrics(tmp_path)
    speed = line["speed"]
    assert speed["seconds_per_step"] == 4 and speed["images_per_second"] == 0.5
    assert speed["data_wait"] == 0.25 and speed["seconds_left"] == 4 * 98
    assert speed["tflops_per_device"] * jax.device_count() == pytest.approx(2e9 / 4 / 1e12)
    assert speed["mfu"] == pytest.approx(2 / jax.device_count())
    # Evaluations are no throughput, but they are wall time.
    wall = {"goodput": 6 / 208, "badput_data": 2 / 208, "badput_evaluation": 200 / 208}
    assert {name: speed[name] for name in wall} == pytest.approx(wall)
    assert "MFU" in describe(line) and "data wait 25%" in describe(line)


def test_too_many_skipped_in_a_row_stop_the_run(tmp_path, writer, capsys):
    progress = make_progress(tmp_path, writer)
    progress.push(1, metrics_of(np.inf, in_a_row=1), NAMES)
    progress.push(2, metrics_of(np.nan, in_a_row=2), NAMES)
    progress.push(3, metrics_of(np.nan, in_a_row=3), NAMES)
    with pytest.raises(UserError, match="none in 3 steps in a row up to step 3; look at .*nonfin"):
        progress.catch_up()
    assert "1 images' losses {'dogs': 1}" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    assert names == ["step_1.json", "step_2.json", "step_3.json"]
