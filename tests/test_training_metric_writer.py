"""Lines, events and images of a run, cut back on resume."""

import json
import struct
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from microdit_jax.errors import UserError
from microdit_jax.training import metric_writer
from microdit_jax.training.metric_writer import MetricWriter, keep_until, read_metrics


def events(folder):
    """TensorBoard's records: length, its checksum, the event, its checksum."""
    for file in sorted((folder / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def test_lines_and_events(tmp_path):
    writer = MetricWriter(tmp_path, restored_step=None)
    writer.write(1, {"loss": 0.5, "heldout": {"ema": {"right": 0.25}}})
    writer.write(2, {"loss": float("nan")})
    writer.image(2, "samples", np.full((4, 6, 3), 0.5, np.float32))
    writer.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.5, "heldout": {"ema": {"right": 0.25}}},
        {"step": 2, "loss": None},
    ]
    values = {(e.step, v.tag): v for e in events(tmp_path) for v in e.summary.value}
    assert values[1, "loss"].simple_value == 0.5
    assert values[1, "heldout/ema/right"].simple_value == 0.25
    assert (values[2, "samples"].image.width, values[2, "samples"].image.height) == (6, 4)


@pytest.mark.parametrize("step, expected", [(2, [1, 2, 2]), (9, [1, 2, 2, 3]), (None, [])])
def test_a_resume_keeps_lines_up_to_its_step(tmp_path, step, expected):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s}) for s in (1, 2, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')  # killed while writing
    assert len(read_metrics(tmp_path)) == 4
    MetricWriter(tmp_path, restored_step=step, tensorboard=False).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == expected


def test_a_resume_hides_later_events(tmp_path):
    for restored in (None, 3):
        writer = MetricWriter(tmp_path, restored_step=restored)
        writer.write(4, {"loss": 1.0})
        writer.close()
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert starts[-1] == 4  # what TensorBoard drops: everything from here on


def test_a_restart_is_marked_with_the_steps_that_it_redoes(tmp_path):
    writer = MetricWriter(tmp_path, restored_step=4)
    for number, step, reached in ((0, 0, 0), (1, 4, 9), (2, 9, 9)):
        writer.mark_restart(number, step=step, reached=reached)
    writer.close()
    values = [(e.step, v.tensor.string_val) for e in events(tmp_path) for v in e.summary.value]
    assert values == [
        (4, [b"restart 1 at step 4; steps 5 to 9 are run again"]),
        (9, [b"restart 2 at step 9"]),
    ]


def test_reading_nothing_says_so(tmp_path):
    keep_until(tmp_path / "metrics.jsonl", 3)
    with pytest.raises(UserError, match="expected a training run with metrics.jsonl"):
        read_metrics(tmp_path)


def test_wandb_is_optional_but_never_ignored(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(UserError, match="pip install wandb"):
        MetricWriter(tmp_path, restored_step=None, tensorboard=False, wandb_project="p")

    logged, started = [], []
    run = types.SimpleNamespace(
        log=logged.append, define_metric=lambda *a, **k: None, finish=lambda: None
    )
    fake = types.SimpleNamespace(init=lambda **k: started.append(k) or run, Image=lambda x: x.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for restored in (None, 1):
        writer = MetricWriter(
            tmp_path, restored_step=restored, tensorboard=False, wandb_project="p", config={"a": 1}
        )
        writer.write(1, {"loss": 0.5, "note": "no number"})
        writer.image(1, "samples", np.zeros((2, 2, 3), np.float32))
        writer.mark_restart(restored or 0, step=3, reached=5)
        writer.close()
    assert logged[-1] == {"step": 3, "restart": 1, "restart_redoes_steps": 2}
    assert logged[:2] == [{"step": 1, "loss": 0.5}, {"step": 1, "samples": (2, 2, 3)}]
    assert started[0]["project"] == "p" and started[0]["config"] == {"a": 1}
    assert started[0]["id"] == started[1]["id"]
    assert (tmp_path / "wandb_id").read_text() == started[0]["id"]
    (tmp_path / "wandb_id").write_text("")
    MetricWriter(tmp_path, restored_step=1, tensorboard=False, wandb_project="p").close()
    assert started[2]["id"] and (tmp_path / "wandb_id").read_text() == started[2]["id"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    writer = MetricWriter(tmp_path, restored_step=None, tensorboard=False)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metric_writer, "print", full, raising=False)
    with pytest.raises(UserError, match="free some space"):
        writer.write(1, {"loss": 0.5})
    writer.close()


@pytest.mark.parametrize("file", ["_file", "_tensorboard._file"])
def test_a_full_disk_below_one_of_the_files(tmp_path, file):
    """Each is found at the write, which names it; closing raises no second error over it."""
    writer = MetricWriter(tmp_path, restored_step=None)
    owner, _, name = f"writer.{file}".rpartition(".")
    owner = eval(owner)
    getattr(owner, name).close()
    setattr(owner, name, open("/dev/full", "w" if file == "_file" else "wb"))
    where = "metrics.jsonl" if file == "_file" else "tensorboard"
    for _ in range(30):  # more than any queue holds
        with pytest.raises(UserError, match=rf"could not write .*{where}: No space left"):
            writer.write(1, {"loss": 0.5})
    writer.close()
