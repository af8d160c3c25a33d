"""Which of the weights in a checkpoint are converted, and what is said of the others."""

import pathlib

import numpy as np
import pytest
from conftest import load_golden
from support.convert_command import fails, run
from support.synthetic import synthetic_dit

from microdit_jax.checkpoints.model_folder import load_model, read_metadata
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.state_dict import find_tensors, read_state_dict, strip_prefixes
from microdit_jax.errors import UserError

FILES = pathlib.Path(__file__).parent / "golden" / "torch_files"
A = np.arange(12, dtype=np.float32).reshape(3, 4)
RAW, AVERAGE = {"blocks.0.w": A, "b": A[0]}, {"blocks.0.w": A + 1, "b": A[0] + 1}
OPTIMISER = {"state": {0: {"exp_avg": A, "step": np.array(1, np.float32)}}, "param_groups": []}


def taken(contents, weights=None) -> dict[str, np.ndarray]:
    return strip_prefixes(find_tensors(contents, weights=weights).tensors, "dit").tensors


def prefixed(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "contents",
    [
        {"ema": RAW},
        {"ema_state_dict": RAW, "epoch": 3},
        {"net": RAW},
        {"params": RAW},
        {"generator": RAW, "optimizer": OPTIMISER},
        {"model": {"state_dict": RAW}},
        {"model": {"state_dict": RAW, "ema": AVERAGE}},
        {"model": RAW, "ema": AVERAGE, "optimizer": OPTIMISER},
        {"unheard_of": RAW, "opt": OPTIMISER, "rng": {"cpu": A.astype(np.uint8)}},
        {"step": np.array(3), "loss": np.array(0.5, np.float32), "ema": RAW},
        {"state": {"model": prefixed("dit.", RAW), "optimizers": OPTIMISER}},
        prefixed("model.", RAW),
        prefixed("model.dit.", RAW) | {"model.vae.w": A},
        prefixed("net.module.dit.", RAW) | {"loss.w": A},
        prefixed("model.", RAW) | {"loss.w": A},
        prefixed("module.", RAW) | {"n_averaged": np.array(2)},
        {"ema": prefixed("module.dit.", RAW) | {"n_averaged": np.array(2)}},
        {"_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.w": A, "_orig_mod.b": A[0]},
        {"model._orig_mod.dit.blocks.0._fsdp_wrapped_module.module.w": A, "model.dit.b": A[0]},
        prefixed("model.", RAW) | prefixed("ema_model.", AVERAGE),
        RAW | prefixed("ema.", AVERAGE),
    ],
)
def test_the_network_is_found_under_every_wrapper(contents):
    found = taken(contents)
    assert set(found) == {"blocks.0.w", "b"}
    np.testing.assert_array_equal(found["blocks.0.w"], A)


COMPOSER = {
    "state": {
        "model": prefixed("dit.", RAW),
        "algorithms": [
            (
                "EMA",
                {
                    "ema_model": {
                        "named_parameters_dict": {"dit.blocks.0.w": A + 1},
                        "named_buffers_dict": {"dit.b": A[0] + 1},
                    }
                },
            )
        ],
    }
}


@pytest.mark.parametrize(
    ("contents", "weights"),
    [
        ({"model": RAW, "ema": AVERAGE}, "ema"),
        ({"model": RAW, "model_ema": AVERAGE}, "ema"),
        ({"state_dict": RAW, "ema_state_dict": AVERAGE}, "ema"),
        ({"state_dict": prefixed("model.", RAW) | prefixed("model_ema.", AVERAGE)}, "ema"),
        (RAW | prefixed("ema.", AVERAGE), "ema"),
        (COMPOSER, "ema"),
        (COMPOSER, "state.algorithms"),
        ({"a": RAW, "b": {"c": AVERAGE}}, "b.c"),
        ({"a": RAW, "b": {"c": AVERAGE}}, "b"),
        ({"a": prefixed("first.", RAW) | prefixed("second.", AVERAGE)}, "a.second"),
        (prefixed("first.", RAW) | prefixed("second.part.", AVERAGE), "second.part"),
        ({"ema": RAW, "model": AVERAGE}, "model"),
        ({"model": RAW, "other": AVERAGE}, "other"),
    ],
)
def test_other_weights_are_taken_when_asked_for(contents, weights):
    found = taken(contents, weights)
    assert set(found) == {"blocks.0.w", "b"}
    np.testing.assert_array_equal(found["blocks.0.w"], A + 1)


@pytest.mark.parametrize(
    ("contents", "weights", "message"),
    [
        ({"model": RAW}, "ema", r"under ema in .*found model \(raw weights, 2 tensors, 0.00 MB\)"),
        ({"ema": RAW}, "model", r"found ema \(moving average, 2 tensors"),
        ({"model": RAW}, "modle", "weights under modle in .*found model"),
        ({"ema_1": RAW, "ema_2": RAW}, None, "the weights of one network in .*ema_1.*ema_2.*choos"),
        (
            {"model": RAW, "ema_1": RAW, "ema_2": RAW},
            "ema",
            "choose by python -m convert --weights=",
        ),
        ({"optimizer": OPTIMISER}, None, r"found optimizer \(optimiser's state, 2 tensors"),
    ],
)
def test_what_cannot_be_chosen_lists_what_there_is(contents, weights, message):
    with pytest.raises(UserError, match=message):
        find_tensors(contents, weights=weights)


def test_constants_that_an_average_lacks_come_from_the_raw_weights():
    raw = {"pos_embed": A[None], "mask_token": A[0], "x_embedder.proj.weight": A}
    average = {"module.x_embedder.proj.weight": A + 1}
    contents = {"model": prefixed("_orig_mod.", raw), "ema": average}
    found = find_tensors(contents, weights="ema")
    tensors = strip_prefixes(found.tensors, "dit").tensors
    assert set(tensors) == set(raw) and tensors["x_embedder.proj.weight"][0, 0] == 1
    assert "taken from the raw weights" in found.notes[-1]


def test_a_file_of_torch_with_an_average(tmp_path):
    found = read_state_dict(FILES / "averaged.pt", "dit")
    np.testing.assert_array_equal(found.tensors["weight"], np.full((3, 4), 2, np.float32))
    (told,) = [note for note in found.notes if "weights taken" in note]
    assert told.startswith("weights taken from model (raw weights, 2 tensors, 0.00 MB); also in")
    assert "ema (moving average, 3 tensors" in told and "optimizer (optimiser's state, 6" in told
    assert told.endswith("--weights=ema takes the average") and "rng" not in told
    average = read_state_dict(FILES / "averaged.pt", "dit", "ema")
    np.testing.assert_array_equal(average.tensors["weight"], np.full((3, 4), 0.75, np.float32))
    assert set(average.tensors) == {"weight", "bias"}


def test_the_command_takes_an_average(tmp_path, capsys):
    config = load_golden("dit_small").config
    raw, average = synthetic_dit(config, 0), synthetic_dit(config, 1)
    write_safetensors(tmp_path / "a.safetensors", raw | prefixed("ema.", average))
    flags = ("--input", tmp_path / "a.safetensors", "--head_dim=8", "--expert_capacity=2")
    kernels = {}
    for weights in ("model", "ema"):
        run(*flags, "--output", tmp_path / weights, f"--weights={weights}")
        assert f"weights taken from {'ema (' * (weights == 'ema')}" in capsys.readouterr().out
        kernels[weights] = load_model(tmp_path / weights)[0]["x_embedder"]["proj"]["bias"]
    for weights, state in (("model", raw), ("ema", average)):
        np.testing.assert_array_equal(kernels[weights], state["x_embedder.proj.bias"])
    assert read_metadata(tmp_path / "ema")["options"]["weights"] == "ema"
    assert "choose another folder" in fails(capsys, *flags, "--output", tmp_path / "ema")
