import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, relative_l2
from support.convert_command import run
from support.inception import FULL, NARROW, synthetic_tensors

from microdit_jax.checkpoints.model_folder import load_model, read_metadata
from microdit_jax.convert.formats.torch_file import read_torch, write_torch
from microdit_jax.convert.inception import (
    from_torch,
    infer_config,
    rename_table,
    to_torch,
)
from microdit_jax.errors import UserError
from microdit_jax.metrics.inception import InceptionConfig, make_inception


def images_of(side: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:side, :side] / side
    base = np.stack([np.sin(9 * x + 4 * y), np.cos(13 * x * y), x - y], -1)
    noise = rng.standard_normal((n, side, side, 3))
    return (base[None] * 0.6 + 0.3 * noise).clip(-1, 1).astype(np.float32)


def activations(config: InceptionConfig, side: int, n: int):
    params = jax.tree.map(jnp.asarray, from_torch(synthetic_tensors(config), config))
    apply = jax.jit(make_inception(config).apply)
    return apply({"params": params}, jnp.asarray(images_of(side, n)))


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def test_a_sixteenth_of_the_width_equals_pytorch_fid():
    golden = load("inception_narrow")
    found = activations(NARROW, 107, 2)
    assert relative_l2(found.pool_1[:, ::5, ::5], golden["pool_1"]) < 1e-5
    assert relative_l2(found.pool_2[:, ::2, ::2], golden["pool_2"]) < 1e-5
    assert relative_l2(found.mixed_6e, golden["mixed_6e"]) < 1e-5
    assert relative_l2(found.pool_3, golden["pool_3"]) < 1e-5
    assert relative_l2(found.logits[:, :64], golden["logits"]) < 1e-5
    # The two images differ, so nothing above was a constant.
    assert relative_l2(found.pool_3[0], found.pool_3[1]) > 1e-2


@pytest.mark.slow
def test_full_size_equals_pytorch_fid():
    golden = load("inception_full")
    found = activations(FULL, 299, 1)
    assert [a.shape[1:] for a in found] == [
        (73, 73, 64), (35, 35, 192), (17, 17, 768), (2048,), (1008,)
    ]  # fmt: skip
    for name in ("pool_1", "pool_2", "mixed_6e"):
        assert relative_l2(getattr(found, name).mean(axis=(1, 2)), golden[name]) < 1e-5, name
    assert relative_l2(found.pool_3, golden["pool_3"]) < 1e-5
    assert relative_l2(found.logits, golden["logits"]) < 1e-5


def test_full_size_tensors_are_the_public_ones():
    expected = json.loads((GOLDEN / "inception.json").read_text())
    table = {entry.torch_name: list(entry.torch_shape) for entry in rename_table(FULL)}
    assert table == expected
    statistics = sum(math.prod(s) for n, s in expected.items() if "running" in n)
    assert sum(math.prod(e.flax_shape) for e in rename_table(FULL)) - statistics == 23_850_960


def test_both_ways_bit_for_bit():
    tensors = synthetic_tensors(NARROW)
    assert infer_config(tensors) == NARROW
    back = to_torch(from_torch(tensors, NARROW), NARROW)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_the_command(tmp_path, capsys):
    tensors = synthetic_tensors(NARROW)
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    write_torch(tmp_path / "pt_inception.pth", tensors | counters)
    model = tmp_path / "model"
    run("--kind=inception", f"--input={tmp_path / 'pt_inception.pth'}", f"--output={model}")
    said = capsys.readouterr().out
    assert "ignored 1 num_batches_tracked" in said and "128 features, 1008 classes" in said
    assert InceptionConfig(**read_metadata(model)["inception"]) == NARROW
    params, _ = load_model(model)
    np.testing.assert_array_equal(params["fc"]["kernel"], tensors["fc.weight"].T)
    back = tmp_path / "back.pt"
    run("--kind=inception", "--to=torch", f"--input={model}", f"--output={back}")
    assert set(read_torch(back)) == set(tensors)


def test_another_network_is_refused():
    tensors = synthetic_tensors(NARROW)
    with pytest.raises(UserError, match="expected Inception-v3 with .*found 1 tensors"):
        infer_config({"conv1.weight": np.zeros((4, 3, 3, 3), np.float32)})
    with pytest.raises(UserError, match="found torchvision's Inception-v3"):
        infer_config(tensors | {"AuxLogits.fc.bias": np.zeros(3, np.float32)})
    del tensors["Mixed_7c.branch_pool.bn.running_var"]
    with pytest.raises(UserError, match=r"missing: Mixed_7c\.branch_pool\.bn\.running_var"):
        from_torch(tensors, NARROW)
    with pytest.raises(UserError, match="divisor must be 1, 2, 4, 8 or 16, found 3"):
        InceptionConfig(divisor=3)
