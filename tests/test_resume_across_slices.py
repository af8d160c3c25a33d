"""Whole runs whose weights are split over two slices: stopped, resumed, taken to another mesh."""

import itertools

import jax
import numpy as np
import pytest

from configs import demo
from microdit_jax import train as train_module
from microdit_jax.machine import slices
from microdit_jax.machine.signals import Phase
from microdit_jax.train import train
from microdit_jax.training import streaming

pytestmark = pytest.mark.slow


def config_of(folder, *, fsdp):
    """A demo whose modulations are wide enough to be split over eight devices."""
    config = demo.get_config("pretrain")
    config.data.datasets = ({"source": "twemoji", "folder": str(folder / "data"), "weight": 1.0},)
    config.data.heldout.folder = str(folder / "data")
    config.model.options.update(
        dim=64, depth=2, head_dim=8, multiple_of=8, patch_mixer_dim=16, num_experts=2,
        qkv_multipliers=(1.0,), ffn_multipliers=(1.0,), patch_mixer_mlp_ratio=1.0,
    )  # fmt: skip
    config.train.update(steps=4, batch_size=8, log_every=1, checkpoint_every=2, eval_every=100)
    config.eval.update(num_images=8, batch_size=8, draws=1, num_samples=0)
    config.log.tensorboard = False
    config.mesh.update(data=8 // fsdp, fsdp=fsdp)
    return config


@pytest.fixture
def two_slices(monkeypatch):
    """Eight simulated devices as two slices of four; all blocks but the first send rows."""
    monkeypatch.setattr(slices, "slice_of", lambda device: device.id // 4)
    monkeypatch.setattr(streaming, "AHEAD", 1)
    sent, real = [], streaming._modulation

    def seen(rows, columns):
        sent.append(columns["kernel"].shape)
        return real(rows, columns)

    monkeypatch.setattr(streaming, "_modulation", seen)
    return sent


def stop_at(step, patch):
    """Stops the next run as a signal during that step would."""
    asked = itertools.count(1)
    patch.setattr(
        train_module.StopRequest,
        "agreed",
        lambda self: self.phase is Phase.TRAINING and next(asked) == step,
    )


def test_stopped_and_resumed(two_slices, tmp_path, monkeypatch):
    """Bit for bit on the same mesh, and to rounding on one whose slices hold a copy each."""
    whole = jax.device_get(train(config_of(tmp_path, fsdp=8), tmp_path / "whole"))
    assert (64, 6 * 64 // 8) in two_slices  # columns of a block of the backbone
    for name, fsdp in (("same", 8), ("other", 4)):
        with monkeypatch.context() as patch:
            stop_at(2, patch)
            stopped = train(config_of(tmp_path, fsdp=8), tmp_path / name)
        assert int(stopped.step) == 2
        kernel = stopped.params["blocks_1"][streaming.MODULATION]["kernel"].sharding
        assert kernel.spec == jax.P(None, ("fsdp", "slices")) and kernel.mesh.size == 8
        found = jax.device_get(train(config_of(tmp_path, fsdp=fsdp), tmp_path / name))
        assert int(found.step) == 4
        if fsdp == 8:
            jax.tree.map(np.testing.assert_array_equal, found, whole)
        else:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
                found.params,
                whole.params,
            )
