"""Small training states on any mesh, their checkpoints on disk, and damage to them."""

import pathlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from microdit_jax.checkpoints.run import RunCheckpoints, write_run_metadata

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def mesh(*shape: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(shape))]
    axes = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(shape, ("data", "fsdp", "expert"), axes, devices=devices)


def split(leaf, mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """The first axis over fsdp, the second over expert, where they divide."""
    names = [
        name if size % mesh.shape[name] == 0 else None
        for name, size in zip(("fsdp", "expert"), leaf.shape, strict=False)
    ]
    return jax.NamedSharding(mesh, jax.P(*names))


def abstract(state, sharding=lambda leaf: ONE):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), state
    )


class State(flax.struct.PyTreeNode):
    """The parts of train_step.TrainState that matter here."""

    step: Any
    params: Any
    opt_state: Any
    ema: Any


def make_state(step: int) -> State:
    """A state of AdamW and an average, every number of it another for another step."""
    rng = np.random.default_rng(step)
    params = {  # the kernel is stored by itself, the others packed
        "blocks_0": {"kernel": rng.normal(size=(512, 512)), "experts": rng.normal(size=(4, 8, 6))},
        "bias": rng.normal(size=5),
    }
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    opt_state = optax.adamw(1e-3).init(params)
    opt_state = jax.tree.map(lambda a: a + jnp.asarray(step, a.dtype), opt_state)
    ema = jax.tree.map(lambda p: p * 2, params)
    return State(step=jnp.int32(step), params=params, opt_state=opt_state, ema=ema)


def save_steps(workdir, *steps, **options):
    with RunCheckpoints(workdir, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"step": step, "seed": 18})
    write_run_metadata(workdir, {"has_ema": True})


def restore(workdir, **options):
    with RunCheckpoints(workdir) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)), **options)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [a.dtype for a in jax.tree.leaves(found)] == [a.dtype for a in jax.tree.leaves(expected)]


def files_of(workdir, step: int) -> list[pathlib.Path]:
    folder = workdir / "checkpoints" / str(step)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: pathlib.Path, position: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 1
    path.write_bytes(data)


def largest(workdir, step: int) -> pathlib.Path:
    return max(files_of(workdir, step), key=lambda path: path.stat().st_size)
