"""One train step on many meshes: equal results, and no collectives but the intended ones.

Compiling is most of the time here, so the network has one block of each kind.
"""

import collections
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.one_of_each import CONFIG, EDM, mesh_of

from microdit_jax import sharding
from microdit_jax.errors import UserError
from microdit_jax.models.dit import DiT
from microdit_jax.training import averages, optim
from microdit_jax.training import step as train_step

SCHEDULE = optim.learning_rate(2e-3, warmup_steps=5)
# Adam divides a gradient by its own size: where it is zero but for rounding (here in t_embedder),
# the usual eps of 1e-8 would make a whole step of the rounding, another one on every mesh.
OPTIMIZER = optim.adamw(SCHEDULE, eps=1e-5)
SHARD_ALL = {"replicate_below": 64}  # the network is small


def make_step(mesh, micro_batches: int = 1, dispatch: str = "gather"):
    return train_step.make_train_step(
        DiT(dataclasses.replace(CONFIG, moe_dispatch=dispatch)),
        OPTIMIZER,
        SCHEDULE,
        edm=EDM,
        mask_ratio=0.75,
        seed=18,
        ema_smoothing=0.9,
        ema_start_step=2,
        mesh=mesh,
        micro_batches=micro_batches,
        **SHARD_ALL,
    )


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "latents": rng.normal(size=(16, 8, 8, 4)).astype(np.float32),
        "caption_latents": rng.normal(size=(16, 7, 24)).astype(np.float32),
        "keep_caption": (rng.random(16) > 0.2).astype(np.float32),
    }


def shaken(state: train_step.TrainState) -> train_step.TrainState:
    """Adds noise to all weights: those that start at zero would hide most others for a while."""

    def shake(weight):
        noise = 0.1 * np.random.default_rng(weight.size).normal(size=weight.shape)
        return jax.device_put(np.asarray(weight) + noise.astype(np.float32), weight.sharding)

    params = jax.tree.map(shake, state.params)
    return averages.begun(state.replace(params=params, ema=jax.tree.map(jnp.copy, params)))


@functools.cache
def train(sizes: tuple[int, ...] | None, *options):
    """The state after 20 steps, and each step's metrics."""
    if sizes is None:
        init = functools.partial(train_step.init_state, DiT(CONFIG), OPTIMIZER, with_ema=True)
        mesh, state, batch = None, jax.jit(init)(jax.random.key(0)), make_batch()
    else:
        mesh = mesh_of(sizes)
        state = train_step.sharded_init(
            DiT(CONFIG), OPTIMIZER, jax.random.key(0), mesh, with_ema=True, **SHARD_ALL
        )
        batch = sharding.put_batch(make_batch(), mesh)
    state, metrics = shaken(state), []
    step = jax.jit(make_step(mesh, *options), donate_argnums=0)
    for _ in range(20):
        state, found = step(state, batch)
        metrics.append(jax.device_get(found))
    return jax.device_get(state), metrics


MESHES = [
    ((1, 1, 1), 4),
    ((8, 1, 1), 1),
    ((1, 8, 1), 2),
    ((1, 2, 2, 2), 1),  # weights split over slices too
    ((1, 1, 8), 1),
    ((2, 2, 2), 1),
    ((2, 2, 2), 2, "onehot"),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", MESHES, ids=str)
def test_twenty_steps_equal_one_device(options):
    """Losses, gradient norms, and the whole state: weights, gradients' moments, averages."""
    expected_state, expected = train(None)
    state, metrics = train(*options)
    for name in ("loss", "grad_norm", "image_loss", "image_sigma", "learning_rate"):
        np.testing.assert_allclose(
            [m[name] for m in metrics], [m[name] for m in expected], rtol=1e-5, err_msg=name
        )
    errors = jax.tree.map(
        lambda a, b: relative_l2(a, b) if np.any(b) else float(np.abs(a).max()),
        state,
        expected_state,
    )
    worst = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda item: item[1])
    assert worst[1] < 1e-5, jax.tree_util.keystr(worst[0])
    # What is compared has moved: the weights by a few percent at the least.
    start = shaken(train_step.init_state(DiT(CONFIG), OPTIMIZER, jax.random.key(0), with_ema=True))
    assert relative_l2(state.params["final_layer"]["linear"]["kernel"],
                       start.params["final_layer"]["linear"]["kernel"]) > 0.03  # fmt: skip


def test_initialised_in_place():
    """The same values as on one device, and never a whole copy on any of eight."""
    mesh, key = mesh_of((2, 2, 2)), jax.random.key(3)
    state = train_step.sharded_init(DiT(CONFIG), OPTIMIZER, key, mesh, with_ema=True, **SHARD_ALL)
    plain = jax.jit(functools.partial(train_step.init_state, DiT(CONFIG), OPTIMIZER, with_ema=True))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), state, plain(key)
    )
    target = train_step.abstract_state(DiT(CONFIG), OPTIMIZER, mesh, with_ema=True, **SHARD_ALL)
    assert jax.tree.map(lambda a: a.sharding, state) == jax.tree.map(lambda a: a.sharding, target)
    w1 = state.params["blocks_0"]["mlp"]["w1"]
    assert {s.data.shape for s in w1.addressable_shards} == {(4, 32, 64)}


def test_batch_must_divide():
    mesh = mesh_of((2, 2, 2))
    state = train_step.abstract_state(DiT(CONFIG), OPTIMIZER, mesh, with_ema=True, **SHARD_ALL)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_batch()))
    with pytest.raises(UserError, match="8 devices x 3 micro-batches, found 16 images"):
        jax.eval_shape(make_step(mesh, 3), state, batch)


def test_eval_loss_is_the_same_on_a_mesh():
    mesh = mesh_of((2, 2, 2))
    batch = make_batch() | {"draw": np.int32(3)}
    state = train_step.sharded_init(
        DiT(CONFIG), OPTIMIZER, jax.random.key(0), mesh, with_ema=False, **SHARD_ALL
    )
    params = shaken(state.replace(ema=state.params)).params
    one = train_step.make_eval_step(DiT(CONFIG), edm=EDM, seed=1)
    many = train_step.make_eval_step(DiT(CONFIG), edm=EDM, seed=1, mesh=mesh, **SHARD_ALL)
    expected = jax.jit(one)(jax.device_get(params), batch)
    found = jax.jit(many)(params, sharding.put_batch(batch, mesh))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


# ------------------------------------------------------------------------------ the compiler
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def compile_report(sizes: tuple[int, int, int]) -> dict:
    """Counts the compiled step's collectives, split weights, the state's bytes on a device, and how
    many of them are updated in place."""
    mesh = mesh_of(sizes)
    state = train_step.abstract_state(DiT(CONFIG), OPTIMIZER, mesh, with_ema=True, **SHARD_ALL)
    batch = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.batch_sharding(mesh))
        for name, a in make_batch().items()
    }
    compiled = jax.jit(make_step(mesh, 2), donate_argnums=0).lower(state, batch).compile()
    found = collections.Counter(
        re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())
    )
    memory = compiled.memory_analysis()
    return {
        "collectives": found,
        "split": sum("fsdp" in a.sharding.spec for a in jax.tree.leaves(state.params)),
        "bytes": sum(
            int(np.prod(a.sharding.shard_shape(a.shape))) * 4 for a in jax.tree.leaves(state)
        ),
        "updated_in_place": memory.alias_size_in_bytes,
    }


def force_rematerialization():
    """A reshard that the partitioner can only do by way of a whole copy."""
    mesh = mesh_of((2, 2, 2))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=sharding.batch_sharding(mesh))
    to = NamedSharding(mesh, P(None, "fsdp"))
    jax.jit(lambda x: x * 2, out_shardings=to).lower(x).compile()


def run_here(expression: str) -> subprocess.CompletedProcess:
    """Evaluates it in a process of its own, for what the compiler writes to stderr."""
    code = (
        "import conftest, json, jax\n"
        "from test_training_step_mesh import *\n"
        "jax.config.update('jax_enable_compilation_cache', False)  # what is cached warns nobody\n"
        f"print(json.dumps({expression}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.slow
def test_collectives_are_the_intended_ones():
    done = run_here("[compile_report(s) for s in ((2, 4, 1), (2, 2, 2))]")
    assert "rematerialization" not in done.stderr
    fsdp, experts = json.loads(done.stdout.splitlines()[-1])
    for report in (fsdp, experts):
        found = report["collectives"]
        # Each split weight is gathered once a step; its gradient leaves each micro-batch's loop
        # body, one for both, in one reduce-scatter. Nothing moves otherwise but sums.
        assert found["all-gather"] == found["reduce-scatter"] == report["split"] > 30
        assert "collective-permute" not in found
        # The state, and nothing less, is updated in place.
        assert report["updated_in_place"] == report["bytes"]
    assert "all-to-all" not in fsdp["collectives"]
    # One expert layer: tokens there and back, in the forward and in the backward pass.
    assert experts["collectives"]["all-to-all"] == 4
    assert "rematerialization" in run_here("force_rematerialization()").stderr
