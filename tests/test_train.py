"""The real training loop and the real pipeline on a shrunken demo: resumed, continued, poisoned."""

import itertools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from configs import demo
from microdit_jax import sharding
from microdit_jax import train as train_module
from microdit_jax.assets import load
from microdit_jax.checkpoints.run import RunCheckpoints, read_run_metadata
from microdit_jax.data import pipeline
from microdit_jax.errors import UserError
from microdit_jax.machine.signals import Phase
from microdit_jax.models.dit import DiT
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.train import train
from microdit_jax.training.config import make_optimizer, model_config
from microdit_jax.training.metric_writer import read_metrics
from microdit_jax.training.start import starting_state
from microdit_jax.training.workdir import changes


def tiny_config(folder, stage="pretrain", **changes):
    config = demo.get_config(stage)
    config.data.datasets = ({"source": "twemoji", "folder": str(folder / "data"), "weight": 1.0},)
    config.data.heldout.folder = str(folder / "data")
    config.model.options.update(
        dim=16, depth=2, head_dim=8, multiple_of=8, patch_mixer_dim=8, num_experts=2,
        qkv_multipliers=(1.0,), ffn_multipliers=(1.0,), patch_mixer_mlp_ratio=1.0,
    )  # fmt: skip
    config.train.update(steps=4, batch_size=8, log_every=3, checkpoint_every=2, eval_every=100)
    config.eval.update(num_images=16, batch_size=16, draws=1, num_samples=0)
    config.ema.update(start_step=1, snapshot_every=2)
    config.log.tensorboard = False
    config.train.update(changes)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps without interruption, with everything that is recorded."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(folder, module_grad_norms=True)
    config.log.tensorboard = True
    config.eval.update(num_samples=2, num_inference_steps=2)
    config.profile.update(start=2, steps=1)
    return folder, train(config, folder / "whole")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def without_clock(lines):
    """What two equal runs must record alike."""
    dropped = ("speed", "module_grad_norm")
    return [{k: v for k, v in line.items() if k not in dropped} for line in lines]


def test_a_run_leaves_what_it_promises(trained):
    folder, state = trained
    run = folder / "whole"
    assert int(state.step) == 4
    begin, *lines, end = read_metrics(run)
    assert [line["step"] for line in (begin, *lines, end)] == [0, 3, 4, 4]
    for line in begin, end:
        assert set(line["heldout"]) == {"raw", "ema"}
        assert set(line["heldout"]["ema"]) == {"right", "shuffled", "ratio", "by_sigma"}
    assert 0 < lines[0]["loss"] < 10 and lines[0]["skipped"] == 0
    speed = lines[0]["speed"]
    assert speed["images_per_second"] * speed["seconds_per_step"] == pytest.approx(8)
    assert 0 <= speed["data_wait"] < 1 and "mfu" not in speed
    kinds = {"start", "compile", "data", "evaluation", "profile", "save"}
    assert {f"badput_{kind}" for kind in kinds} <= set(lines[1]["speed"])
    assert sum(v for k, v in speed.items() if k.endswith("put") or "put_" in k) == pytest.approx(1)
    assert set(lines[0]["module_grad_norm"]) == set(state.params)
    with Image.open(run / "samples" / "step_0000004.png") as image:
        assert image.width > 300
    assert "samples/step_0000004.png" in (run / "report.html").read_text()
    assert list((run / "tensorboard").iterdir()) and list((run / "profile").rglob("*.xplane.pb"))
    about = read_run_metadata(run)
    assert about["has_ema"] and about["config"]["train"]["steps"] == 4


def test_stopped_and_resumed_is_bit_exact_with_its_records(trained, monkeypatch, capsys):
    folder, state = trained
    with monkeypatch.context() as patch:
        # As a signal during step 2, amid the three steps of a line
        asked = itertools.count(1)
        second = lambda self: self.phase is Phase.TRAINING and next(asked) == 2  # noqa: E731
        patch.setattr(train_module.StopRequest, "agreed", second)
        stopped = train(tiny_config(folder), folder / "resumed")
    assert int(stopped.step) == 2
    assert "stopped and saved at step 2" in capsys.readouterr().out
    # What a run killed after its last save leaves: later lines, and the half of one.
    with open(folder / "resumed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')
    config = tiny_config(folder)
    config.eval.batch_size = 8
    same(train(config, folder / "resumed"), state)
    assert "since step 2 the config changed: eval.batch_size 16 -> 8" in capsys.readouterr().out
    expected, found = (read_metrics(folder / run) for run in ("whole", "resumed"))
    assert without_clock(found[:-1]) == without_clock(expected[:-1])
    assert "badput_restore" not in expected[2]["speed"] and "badput_restore" in found[2]["speed"]


def test_an_evaluation_that_a_signal_stops_is_made_up_for(trained, monkeypatch, capsys):
    """At the last step too, whose state is saved: nothing is measured twice or left out."""
    folder, state = trained
    run, parts = folder / "left", itertools.count()

    def agreed(stop):
        # Amid the last step's evaluation, after its first evaluator.
        return stop.phase is Phase.EVALUATING and step_of(run) == 4 and bool(next(parts))

    with monkeypatch.context() as patch:
        patch.setattr(train_module.StopRequest, "agreed", agreed)
        assert not train_module.train_all(tiny_config(folder), run)
    assert json.loads((run / "evaluation_due.json").read_text())["step"] == 4
    assert train_module.train_all(tiny_config(folder), run)
    assert "resumed; step 4 of 4" in capsys.readouterr().out
    assert not (run / "evaluation_due.json").exists()
    assert train_module.train_all(tiny_config(folder), run)
    assert "done already" in capsys.readouterr().out
    found, expected = (read_metrics(folder / name) for name in ("left", "whole"))
    assert without_clock(found) == without_clock(expected)


def step_of(run):
    """The last step in a run's records."""
    lines = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return max((line["step"] for line in lines), default=0)


def test_samples_that_are_not_finite_do_not_end_a_run(trained, monkeypatch, capsys):
    folder, state = trained

    def nan(self, latents):
        raise UserError("expected finite images, found NaN")

    monkeypatch.setattr(LatentDiffusion, "decode", nan)
    config = tiny_config(folder)
    config.eval.update(num_samples=2, num_inference_steps=2)
    same(train(config, folder / "unseen"), state)
    assert "step 4: no samples: expected finite images" in capsys.readouterr().out
    assert (folder / "unseen" / "report.html").is_file()


def test_done_runs_return_at_once(trained, capsys):
    folder, state = trained
    same(train(tiny_config(folder), folder / "whole"), state)
    assert "done already" in capsys.readouterr().out


def test_two_stages_as_one_run(trained, monkeypatch, capsys):
    folder, _ = trained
    config = demo.get_config()
    with config.unlocked():
        config.pretrain = tiny_config(folder, steps=2)
        config.finetune = tiny_config(folder, "finetune", steps=3)

    def signalled(config, workdir, stop):
        state = train(config, workdir, stop)
        os.kill(os.getpid(), signal.SIGTERM)  # too late for the stage, which has ended
        return state

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train", signalled)
        assert not train_module.train_stages(config, folder / "both")
    assert "stage 2" not in capsys.readouterr().out
    assert train_module.train_stages(config, folder / "both")
    out = capsys.readouterr().out
    assert f"full state of {folder}/both/pretrain, step 2; step 2 of 3" in out
    page = (folder / "both" / "report.html").read_text()
    assert "<td>pretrain<td>2<td>" in page and "<td>finetune<td>3<td>" in page
    assert train_module.train_stages(config, folder / "both")
    out = capsys.readouterr().out
    assert "stage 1 of 2, pretrain: done" in out and "stage 2 of 2, finetune: done" in out


def test_a_chain_whose_second_stage_is_bad_does_not_start(trained):
    folder, _ = trained
    config = demo.get_config()
    with config.unlocked():
        config.pretrain = tiny_config(folder, steps=2)
        config.finetune = tiny_config(folder, "finetune", steps=3, micro_batch_size=3)
    config.finetune.train.batch_size = 64
    with pytest.raises(UserError, match="stage finetune: .*must divide the 8 images of each"):
        train_module.train_stages(config, folder / "bad")
    assert not (folder / "bad").exists()


def test_a_chain_says_which_stage_needs_data_that_is_not_there(trained, monkeypatch, capsys):
    folder, _ = trained
    config = demo.get_config()
    with config.unlocked():
        config.pretrain = tiny_config(folder, steps=2)
        config.finetune = tiny_config(folder, "finetune", steps=3)
    later = str(folder / "later")
    config.finetune.data.heldout.update(source="latents", folder=later)
    said = []

    def stopped(config, workdir, stop):
        said.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_module.train_stages(config, folder / "waiting")
    assert f"stage finetune will need data that is not there yet: {later}" in said[0]


def test_weights_alone_start_anew_on_another_mesh(trained):
    folder, state = trained
    config = tiny_config(folder)
    config.init_weights_from = "{workdir}/../whole"
    mesh = sharding.make_mesh(2, 2, 2)
    with RunCheckpoints(folder / "anew") as checkpoints:
        found = starting_state(
            config, folder / "anew", checkpoints, DiT(model_config(config)),
            make_optimizer(config)[0], mesh,
            {"vae": "patch_pca:patch=4,channels=8,images=3563x32x32"},
        )  # fmt: skip
    assert found.resumed is None and "step 4, moving average" in found.description
    same(found.state.params, state.ema)
    same(found.state.ema, state.ema)
    assert int(found.state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found.state.opt_state))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(found.state))


@pytest.mark.parametrize(
    "of_run, message",
    [
        (None, "expected averages/start absent, found"),
        ({"ema": None}, "expected averages/start absent, found"),
        ({"ema": []}, "expected config.ema in .*config.json of type dict, found"),
        ({"ema": {"snapshot_every": "x"}}, "config.ema.snapshot_every in .*type int, found 'x'"),
    ],
)
def test_starts_from_runs_that_say_little(trained, tmp_path, of_run, message):
    shutil.copytree(trained[0] / "whole", tmp_path / "whole")
    about = json.loads((tmp_path / "whole" / "config.json").read_text())
    about["config"] = of_run
    (tmp_path / "whole" / "config.json").write_text(json.dumps(about))
    config = tiny_config(trained[0], steps=5)
    config.init_from, config.ema.snapshot_every = str(tmp_path / "whole"), 0
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "next")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"init_from": "whole", "init_weights_from": "whole"}, "give one of"),
        ({"init_from": "whole"}, "is at step 4 already, found 4; raise it"),
        ({"init_from": "nowhere"}, "config.init_from names, found none; train that stage"),
        ({"init_from": "data"}, "config.init_from names, found none; train that stage"),
        ({"init_weights_from": "nowhere"}, "config.init_weights_from names, found none; train"),
        ({"init_weights_from": "data"}, "expected a model folder"),
    ],
)
def test_starts_that_cannot_be(trained, change, message):
    folder, _ = trained
    config = tiny_config(folder)
    config.update({name: str(folder / value) for name, value in change.items()})
    with pytest.raises(UserError, match=message):
        train(config, folder / "never")
    assert not (folder / "never").exists()


def test_other_towers_than_the_first_run_s_are_refused(trained):
    folder, _ = trained
    config = tiny_config(folder, steps=9)
    config.init_from = str(folder / "whole")
    config.data.text_encoder = "table:width=256,tokens=16,seed=1"
    config.data.datasets[0]["folder"] = config.data.heldout.folder = str(folder / "other")
    with pytest.raises(UserError, match="was trained with the text_encoder table:.*seed=0, found"):
        train(config, folder / "never")


def test_a_poisoned_batch_is_skipped_counted_and_written_down(trained, monkeypatch, capsys):
    folder, _ = trained
    batches = pipeline.batches

    def poisoned(dataset, start_step, **options):
        for step, batch in enumerate(batches(dataset, start_step, **options), start_step + 1):
            if step == 3:
                batch["latents"][5] = np.nan
                indices.append(batch["index"].tolist())
            yield batch

    indices = []
    monkeypatch.setattr(pipeline, "batches", poisoned)
    state = train(tiny_config(folder, steps=6, log_every=1), folder / "poisoned")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.ema)))
    lines = [line for line in read_metrics(folder / "poisoned") if "loss" in line]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, False, False]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert 0.1 < lines[-1]["loss"] < 3
    found = json.loads((folder / "poisoned" / "nonfinite" / "step_3.json").read_text())
    assert found["images_not_finite"] == [5] and found["index"] == indices[0]
    assert found["dataset"] == [str(folder / "data")] * 8
    assert len(found["sigma"]) == 8 and min(found["sigma"]) > 0
    assert found["loss"][5] == "nan" and 0 < float(found["loss"][0]) < 100
    assert "step 3: not finite, update skipped (1 in a row, 1 in all)" in capsys.readouterr().out


def test_the_average_is_what_is_sampled(trained):
    folder, state = trained
    model = load.load_model(str(folder / "whole"))
    same(model.params, state.ema)
    same(load.load_model(str(folder / "whole"), ema=False).params, state.params)
    assert "moving average" in model.description


def test_an_average_of_any_length_is_sampled_after_training(trained):
    folder, state = trained
    run = str(folder / "whole")
    for name, tree in state.averages.trees.items():
        model = load.load_model(run, ema_length=float(name))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), model.params, tree)
    model = load.load_model(run, ema_length=0.08)
    assert model.ema_length == 0.08 and "step 4, average of length 0.08" in model.description
    for name, options in ((run, {"ema": False}), ("instant", {}), ("nowhere", {})):
        with pytest.raises(UserError, match="--ema_length is for a training run that keeps"):
            load.load_model(name, ema_length=0.08, **options)


def test_another_network_in_the_same_workdir_is_refused(trained):
    folder, _ = trained
    config = tiny_config(folder, steps=9)
    config.model.options.dim = 24
    with pytest.raises(UserError, match="does not fit this config"):
        train(config, folder / "whole")


def test_changes_between_a_config_and_one_from_json():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert changes(old, {"a": {"b": 1, "c": (1, 2)}, "d": None}) == []
    assert changes(old, {"a": {"b": 2, "c": (1, 2)}, "d": None}) == ["a.b 1 -> 2"]
