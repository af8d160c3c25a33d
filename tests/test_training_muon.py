"""Muon's orthogonalisation, which weights get it, and that shards make no difference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_l2
from support.one_of_each import CONFIG, EDM, mesh_of

from configs import demo
from microdit_jax import sharding
from microdit_jax.checkpoints.run import RunCheckpoints
from microdit_jax.errors import UserError
from microdit_jax.models.dit import DiT, abstract_params
from microdit_jax.training import muon, optim
from microdit_jax.training import step as train_step
from microdit_jax.training.config import check, make_optimizer
from microdit_jax.trees import flatten

SCHEDULE = optim.learning_rate(1e-2, warmup_steps=2)
# Adam's eps, so that gradients that are zero but for rounding move nothing
OPTIMIZER = optim.adamw(SCHEDULE, eps=1e-5, muon_dtype=jnp.float32)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def updated(optimizer, updates, params=None) -> dict[str, Any]:
    """The optimiser's first updates, by path."""
    with optim.lenient_promotion():
        found, _ = optimizer.update(updates, optimizer.init(params or updates), params)
    return flatten(found)


@pytest.fixture(autouse=True)
def lenient():
    """Optax's own code mixes types; `optim.apply_gradients` allows it too."""
    with optim.lenient_promotion():
        yield


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_singular_values_end_near_one(shape):
    matrix = random(*shape)
    found = np.asarray(muon.newton_schulz(jnp.asarray(matrix)))
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    rotated = left.T @ found @ right.T  # diagonal, if singular vectors stay
    assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-4
    assert 0.65 < np.diag(rotated).min() and np.diag(rotated).max() < 1.25
    assert np.isfinite(muon.newton_schulz(jnp.zeros(shape))).all()


def test_optax_agrees():
    """The first update of optax.contrib.muon, of the same scale; later ones differ in momentum."""
    params = {"kernel": jnp.asarray(random(24, 40))}
    grads = {"kernel": jnp.asarray(random(24, 40, seed=1))}
    theirs = optax.contrib.muon(0.1, consistent_rms=muon.RMS, weight_decay=0.3)
    ours = muon.muon(optax.scale_by_learning_rate(0.1), optax.adamw(0.1), weight_decay=0.3)
    expected, found = (updated(o, grads, params)["kernel"] for o in (theirs, ours))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_momentum_by_hand():
    params: dict[str, Any] = {"kernel": jnp.zeros((8, 12))}
    optimizer = muon.muon(optax.scale_by_learning_rate(1.0), optax.adamw(1.0), weight_decay=0.0)
    state, trace = optimizer.init(params), np.zeros((8, 12), np.float32)
    for step in range(3):
        grad = random(8, 12, seed=step)
        trace = 0.95 * trace + grad
        expected = -0.2 * np.sqrt(12) * muon.newton_schulz(jnp.asarray(grad + 0.95 * trace))
        found, state = optimizer.update({"kernel": jnp.asarray(grad)}, state, params)
        np.testing.assert_allclose(flatten(found)["kernel"], expected, rtol=1e-4, atol=1e-5)


def test_which_weights_are_hidden_matrices():
    labels: dict[str, Any] = flatten(muon.labels(abstract_params(CONFIG)))
    found = {path for path, label in labels.items() if label == "muon"}
    assert {"blocks_0/attn/qkv/kernel", "blocks_0/mlp/w1", "blocks_0/mlp/w2"} <= found
    assert not [path for path in found if path.split("/")[0] in ("x_embedder", "final_layer")]
    assert not [path for path in found if path.endswith(("bias", "scale"))]
    assert labels["x_embedder/proj/kernel"] == labels["blocks_0/norm1/scale"] == "adamw"


def test_each_expert_by_itself():
    found = updated(muon.orthogonalized(), {"blocks_0": {"w1": jnp.asarray(random(3, 8, 12))}})
    for one, of_one in zip(found["blocks_0/w1"], random(3, 8, 12), strict=True):
        expected = 0.2 * np.sqrt(12) * muon.newton_schulz(jnp.asarray(of_one))
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ on a mesh
WEIGHTS: dict[str, Any] = {
    "x_embedder": {"kernel": random(8, 16, seed=1)},
    "blocks_0": {
        "qkv": {"kernel": random(16, 24, seed=2)},
        "proj": {"kernel": random(24, 16, seed=3), "bias": random(16, seed=4)},
        "mlp": {"w1": random(4, 16, 24, seed=5), "w2": random(4, 24, 16, seed=6)},
    },
    "blocks_1": {"qkv": {"kernel": random(16, 24, seed=7)}},
}


def gradients(model, **options):
    """In place of the network's: gradients that every device computes alike."""

    def of_weights(params, batch, key):
        grads = jax.tree.map(lambda w: jnp.cos(3 * w), params)
        return train_step.Gradients(grads, optax.tree.norm(grads), jnp.ones(8), jnp.ones(8))

    return of_weights


def first_state(mesh) -> train_step.TrainState:
    state = train_step.TrainState.create(
        jax.tree.map(jnp.asarray, WEIGHTS), OPTIMIZER, with_ema=False
    )
    if mesh is None:
        return state
    return jax.device_put(state, sharding.shardings(state, mesh, replicate_below=64))


def compiled_step(monkeypatch, mesh, state):
    monkeypatch.setattr(train_step, "make_gradients", gradients)
    step = train_step.make_train_step(
        DiT(CONFIG), OPTIMIZER, SCHEDULE, edm=EDM, mask_ratio=0.0, seed=0, ema_smoothing=0.0,
        ema_start_step=0, mesh=mesh, replicate_below=64,
    )  # fmt: skip
    return jax.jit(step).lower(state, {}).compile()


def three_steps(monkeypatch, sizes):
    """The state after three steps of make_train_step, and the compiled program's text."""
    mesh = None if sizes is None else mesh_of(sizes)
    state = first_state(mesh)
    step = compiled_step(monkeypatch, mesh, state)
    for _ in range(3):
        state, _ = step(state, {})
    return jax.device_get(state), step.as_text() or ""


def test_resumed_is_bit_equal(monkeypatch, tmp_path):
    """The optimiser's state has no leaf where the other optimiser has one."""
    mesh = mesh_of((2, 2, 2))
    state = first_state(mesh)
    step = compiled_step(monkeypatch, mesh, state)
    state, _ = step(state, {})
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )
        resumed, _ = checkpoints.restore(target)
    jax.tree.map(np.testing.assert_array_equal, step(resumed, {})[0], step(state, {})[0])


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 4, 2, 1)])
def test_shards_make_no_difference(monkeypatch, sizes):
    expected, _ = three_steps(monkeypatch, None)
    found, program = three_steps(monkeypatch, sizes)
    found, expected = flatten(found.params), flatten(expected.params)
    for path, start in flatten(WEIGHTS).items():
        assert relative_l2(expected[path], start) > 1e-3, path  # has moved
        assert relative_l2(found[path] - start, expected[path] - start) < 1e-4, path
    # Shards of four shapes go to the matrices' devices and back; on the second mesh, copies over
    # data (and expert, of what that does not split) share the matrices.
    assert program.count(" all-to-all(") == 8
    assert program.count(" all-gather(") == (4 if sizes == (2, 2, 2) else 0)


def test_operations_of_an_update():
    weights = {"a": {"kernel": np.zeros((3, 5))}, "b": {"w1": np.zeros((2, 4, 3))}, "c": np.ones(3)}
    by_hand = muon.STEPS * (2 * 3 * 5 * 3 * 2 + 2 * 3**3)
    by_hand += 2 * muon.STEPS * (2 * 3 * 4 * 3 * 2 + 2 * 3**3)
    assert muon.update_flops(weights) == by_hand


def test_the_configuration_chooses():
    config = demo.get_config("pretrain")
    params = {"a": {"kernel": jnp.ones((4, 6))}}
    plain = make_optimizer(config)[0].init(params)
    config.optim.name = "muon"
    check(config)
    assert jax.tree.structure(make_optimizer(config)[0].init(params)) != jax.tree.structure(plain)
    config.optim.name = "sgd"
    with pytest.raises(UserError, match="optim.name must be one of adamw, muon, found 'sgd'"):
        check(config)
