import json

import numpy as np
import pytest
from conftest import GOLDEN, load_golden

from convert import parity, reference
from convert.parity import at_resolution, compare, routing_difference, rows, sample_inputs
from microdit_jax.convert.dit import infer_config
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.errors import UserError

MODULES = ["x_embedder", "t_embedder", "y_embedder", "y_emb_preprocess", "pooled_y_emb_process"]
MODULES += [
    "patch_mixer.0",
    "patch_mixer.1",
    "patch_mixer.2",
    "blocks.0",
    "blocks.1",
    "blocks.2",
    "blocks.3",
]
MODULES += ["final_layer", "sample"]
NAME = "dit_small"
SIZES = ("--head_dim=8", "--expert_capacity=2")  # of that network


def tensors():
    golden = load_golden(NAME)
    return {
        key.removeprefix("state_dict/"): golden.arrays[key] for key in golden.keys("state_dict/")
    }


def test_the_table_against_recorded_activations(tmp_path, capsys):
    # One weight is changed: its block and all after it must stand out, and nothing before.
    changed = tensors()
    changed["blocks.2.mlp.w3.weight"] = changed["blocks.2.mlp.w3.weight"] * np.float32(1.01)
    write_torch(tmp_path / "dit.pt", changed)
    golden = load_golden(NAME)
    routing = {"routing/blocks.1": np.zeros((2, 4, 8), np.int32)}  # every expert takes token 0
    keys = [*golden.keys("activation/"), "x", "t", "y", "sample"]
    np.savez(tmp_path / "recorded.npz", **{k: golden.arrays[k] for k in keys}, **routing)
    (tmp_path / "config.json").write_text(str(golden.arrays["config"]))
    flags = [f"--input={tmp_path / 'dit.pt'}", f"--json={tmp_path / 'parity.json'}"]
    flags.append(f"--config={tmp_path / 'config.json'}")
    parity.main([*flags, f"--activations={tmp_path / 'recorded.npz'}"])

    report = json.loads((tmp_path / "parity.json").read_text())
    assert [row["module"] for row in report["rows"]] == MODULES
    for row in report["rows"]:
        errors, name = row["float32"], row["module"]
        if name in ("blocks.2", "blocks.3", "final_layer", "sample"):
            assert 1e-4 < errors["relative_l2"] < 1e-1 and errors["share_off"] > 0, name
        else:
            assert errors["relative_l2"] < 2e-5 and errors["share_off"] == 0, name
            assert row["bfloat16"]["relative_l2"] < 5e-2, name
        assert ("routing_differs" in errors) == (name == "blocks.1")
    assert report["rows"][7]["bfloat16"]["relative_l2"] > 1e-4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == MODULES


def test_figures_of_one_array():
    expected = np.random.default_rng(0).standard_normal((4, 25))
    expected = (expected - expected.mean()) / expected.std() * 3
    ours = expected.copy()
    ours[0, :5] += 0.6
    found = compare(ours.astype(np.float32), expected)
    assert found["median"] == pytest.approx(0, abs=1e-6)
    assert found["max"] == pytest.approx(0.2, rel=1e-4)
    assert found["relative_l2"] == pytest.approx(0.6 * np.sqrt(5) / 30, rel=1e-4)
    assert found["share_off"] == 0.05


def test_routing_counts_tokens_not_their_order():
    reference = np.array([[[0, 1, 2], [3, 4, 5]]])
    assert routing_difference(np.array([[[2, 0, 1], [5, 3, 4]]]), reference) == 0
    assert routing_difference(np.array([[[2, 0, 7], [5, 3, 4]]]), reference) == pytest.approx(1 / 6)


def test_a_recording_of_another_network():
    with pytest.raises(UserError, match=r"activation/blocks\.9 that it does not have"):
        rows({"float32": {"sample": np.zeros(3)}}, {"activation/blocks.9": np.zeros(3)})


def test_another_resolution():
    config = infer_config(tensors())
    larger, moved = at_resolution(config, tensors(), 16)
    assert (larger.input_size, larger.pos_interp_scale) == (16, 2.0)
    assert moved["pos_embed"].shape == (1, 64, 32)
    # Every second position of the finer grid is a position of the coarser one.
    coarse = tensors()["pos_embed"].reshape(4, 4, 32)
    np.testing.assert_allclose(moved["pos_embed"].reshape(8, 8, 32)[::2, ::2], coarse, atol=1e-6)
    assert sample_inputs(larger, 2, 0)["x"].shape == (2, 4, 16, 16)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --reference"),
        (["--reference=a", "--activations=b"], "either --reference"),
        (["--activations=b", "--batch=2"], "--batch does not go with --activations"),
        (["--activations=none.npz"], "expected a recorded .npz at none.npz"),
        ([f"--activations={GOLDEN / 'pos_embed.npz'}"], "record one for this checkpoint"),
        ([f"--activations={GOLDEN / 'dit_16ch_interp2.npz'}"], r"x \(n, 4, 8, 8\)"),
        (["--activations=damaged.npz"], "a recorded .npz at damaged.npz, found BadZipFile"),
        (["--activations=b", "--colour"], "--colour"),
    ],
)
def test_bad_flags_and_recordings(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 cut")
    write_torch(tmp_path / "dit.pt", tensors())
    with pytest.raises(UserError, match=message):
        parity.main([f"--input={tmp_path / 'dit.pt'}", *SIZES, *flags])


def test_the_reference_needs_torch_and_a_checkout(tmp_path, monkeypatch):
    config = infer_config(tensors())
    found = reference.importlib.util.find_spec
    monkeypatch.setattr(
        reference.importlib.util, "find_spec", lambda n: None if n == "torch" else found(n)
    )
    with pytest.raises(UserError, match="expected PyTorch.*pip install torch einops"):
        reference.run_reference(tmp_path, config, tensors(), {})
    with pytest.raises(UserError, match="expected micro_diffusion/models/dit.py in"):
        reference._import_reference(tmp_path)


def test_the_references_arguments():
    golden = load_golden(NAME)
    assert reference.reference_arguments(golden.config) == json.loads(str(golden.arrays["config"]))


def test_a_timm_that_does_not_import_is_stood_in_for(tmp_path, monkeypatch):
    """Beside a torchvision of another torch it raises a RuntimeError, not an ImportError."""
    models = tmp_path / "micro_diffusion" / "models"
    models.mkdir(parents=True)
    (models / "dit.py").write_text("from timm.models.vision_transformer import PatchEmbed\n")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise RuntimeError('nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(reference, "_patch_embed_class", lambda: "stood in")
    assert reference._import_reference(tmp_path).PatchEmbed == "stood in"
