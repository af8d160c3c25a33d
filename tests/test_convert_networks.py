"""Training runs and the model in the package, converted to PyTorch's files and back."""

import jax
import numpy as np
import pytest
from support.convert_command import fails, run
from support.tiny_config import get_config

from convert import parity
from microdit_jax.assets import instant, load
from microdit_jax.checkpoints.model_folder import load_model, read_metadata
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.convert import dit
from microdit_jax.convert.formats.torch_file import read_torch
from microdit_jax.train import train


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tiny run of four steps that keeps an average."""
    folder = tmp_path_factory.mktemp("runs")
    config = get_config(str(folder / "data"))
    config.train.steps = 4
    config.ema.start_step = 1
    train(config, folder / "run")
    return folder / "run"


def test_a_run_is_exported_with_its_config(tmp_path, workdir, capsys):
    files = {}
    for weights in (None, "ema", "model"):
        flags = [f"--weights={weights}"] if weights else []
        output = tmp_path / f"{weights}.pt"
        run("--to=torch", f"--input={workdir}", *flags, f"--output={output}")
        report = capsys.readouterr().out
        other = "ema" if weights == "model" else "model"
        assert f"--weights={other} takes the other" in report and "step 4" in report
        files[weights] = read_torch(output)
    for weights, ema in ((None, True), ("ema", True), ("model", False)):
        model = load.load_model(str(workdir), ema=ema)
        expected = dit.to_torch(jax.tree.map(np.asarray, model.params), model.config)
        assert set(files[weights]) == set(expected)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(files[weights][name], tensor)
    different = [n for n in files["ema"] if not np.array_equal(files["ema"][n], files["model"][n])]
    assert len(different) > 10
    # Back again: the same network with the run's own config.
    run(f"--input={tmp_path / 'ema.pt'}", f"--output={tmp_path / 'back'}")
    assert "read from ema.pt" in capsys.readouterr().out
    stored = dit.config_from_dict(read_metadata(tmp_path / "back")["dit"])
    assert stored == dit.config_from_dict(read_run_metadata(workdir)["dit"])
    params, _ = load_model(tmp_path / "back")
    again = dit.to_torch(jax.tree.map(np.asarray, params), stored)
    for name, tensor in again.items():
        np.testing.assert_array_equal(files["ema"][name], tensor)


def test_the_same_export_again_does_nothing_and_others_do_not_overwrite(tmp_path, workdir, capsys):
    flags = ("--to=torch", "--input", workdir, "--output", tmp_path / "a.safetensors")
    run(*flags, "--weights=ema")
    capsys.readouterr()
    run(*flags)
    assert "nothing to do" in capsys.readouterr().out
    assert "made from something else" in fails(capsys, *flags, "--weights=model")
    flags = ("--to=torch", "--input", workdir, "--output", tmp_path / "b.pt")
    assert "keeps (model and ema), found other" in fails(capsys, *flags, "--weights=other")
    assert "found dit; give python -m convert --kind=dit" in fails(capsys, *flags, "--kind=vae")


@pytest.mark.parametrize("name", ["instant", "microdit_jax/instant", instant.FOLDERS["instant"]])
def test_the_model_in_the_package_is_exported(tmp_path, capsys, name):
    flags = ("--to=torch", f"--input={name}", "--output", tmp_path / "instant.pt")
    run(*flags, "--weights=ema")
    assert "moving average" in capsys.readouterr().out
    model = load.load_model(str(name))
    found = read_torch(tmp_path / "instant.pt")
    for name, tensor in dit.to_torch(model.params, model.config).items():
        np.testing.assert_array_equal(found[name], tensor)
    flags = ("--to=torch", "--input", instant.FOLDERS["instant"], "--output", tmp_path / "b.pt")
    assert "holds the moving average alone" in fails(capsys, *flags, "--weights=model")


def test_parity_takes_a_run_and_the_model_in_the_package(workdir, capsys):
    for given, ema in ((["--weights=model"], False), ([], True)):
        flags = parity.parse_arguments([f"--input={workdir}", "--activations=a.npz", *given])
        config, tensors = parity.load(flags)
        model = load.load_model(str(workdir), ema=ema)
        expected = dit.to_torch(model.params, model.config)
        for name in expected:
            np.testing.assert_array_equal(tensors[name], expected[name])
    assert "step 4, moving average" in capsys.readouterr().err
    flags = parity.parse_arguments(["--input=instant", "--activations=a.npz"])
    assert parity.load(flags)[0].dim == load.load_model("instant").config.dim
