import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model
from support.checkpoints import (
    abstract,
    assert_same,
    flip,
    largest,
    make_state,
    mesh,
    save_steps,
    split,
)

from microdit_jax.checkpoints import model_folder
from microdit_jax.checkpoints.run import write_run_metadata
from microdit_jax.checkpoints.weights import load_run_params, load_weights
from microdit_jax.errors import UserError
from microdit_jax.models.dit import DiT


def test_run_params(tmp_path, capfd):
    save_steps(tmp_path, 5, 10)
    target = abstract(make_state(0).params, lambda leaf: split(leaf, mesh(2, 2, 2)))
    for ema, name in itertools.product((True, False), ("ema", "params")):
        params, step = load_run_params(tmp_path, target, ema=ema)
        same = (name == "ema") == ema
        assert step == 10
        assert same == np.array_equal(params["bias"], getattr(make_state(10), name)["bias"])
        assert params["bias"].sharding == target["bias"].sharding
    flip(largest(tmp_path, 10))
    params, step = load_run_params(tmp_path, target, ema=True)
    assert step == 5 and "using step 5" in capfd.readouterr().err
    assert_same(params, make_state(5).ema)


def test_weights_of_a_run(tmp_path):
    save_steps(tmp_path, 5)
    params, text = load_weights(tmp_path, abstract(make_state(0).params))
    assert_same(params, make_state(5).ema)
    assert text == f"{tmp_path}, step 5, moving average"
    write_run_metadata(tmp_path, {"has_ema": False})
    params, text = load_weights(tmp_path, abstract(make_state(0).params))
    assert_same(params, make_state(5).params)
    with pytest.raises(UserError, match="expected an average of the weights"):
        load_run_params(tmp_path, abstract(make_state(0).params), ema=True)


def test_weights_of_a_model_folder(tmp_path):
    params = make_state(1).params
    stored = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    model_folder.save_model(tmp_path / "model", stored, {"kind": "dit"})
    target = abstract(params, lambda leaf: split(leaf, mesh(2, 2, 2)))
    found, text = load_weights(tmp_path / "model", target)
    assert_same(found, jax.tree.map(lambda p: p.astype(jnp.float32), stored))
    assert found["bias"].sharding == target["bias"].sharding and "model folder" in text
    with pytest.raises(UserError, match="found others .*the first is bias"):
        load_weights(tmp_path / "model", abstract(params | {"bias": jnp.zeros(7)}))
    flip(largest_file(tmp_path / "model"))
    with pytest.raises(UserError, match="found damage in"):
        load_weights(tmp_path / "model", target)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)


def test_parameters_do_not_depend_on_the_resolution():
    """Stage 3 starts from the weights of stage 2: only the computed position embedding differs."""

    def shapes(**changes):
        config = tiny_model().config
        config = type(config)(**{**vars(config), **changes})
        x = jnp.zeros((1, config.input_size, config.input_size, config.in_channels))
        y = jnp.zeros((1, 1, config.caption_channels))
        params = jax.eval_shape(DiT(config).init, jax.random.key(0), x, jnp.zeros(1), y)["params"]
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)

    assert shapes(input_size=8) == shapes(input_size=16, pos_interp_scale=2.0)
    assert shapes(input_size=8) != shapes(in_channels=8)
