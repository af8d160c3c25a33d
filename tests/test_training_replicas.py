"""Copies of weights on eight simulated devices: a flipped bit on one of them is found and named."""

import jax
import numpy as np
import pytest
from support.one_of_each import mesh_of

from microdit_jax import sharding
from microdit_jax.errors import UserError
from microdit_jax.training.replicas import ReplicaCheck
from microdit_jax.training.step import TrainState


def make_state(mesh, flip=None) -> TrainState:
    """A state whose copies on the device `flip` differ in one bit."""
    shapes = TrainState(
        jax.ShapeDtypeStruct((), np.int32),
        {
            "block": {"kernel": jax.ShapeDtypeStruct((256, 128), np.float32)},
            "bias": jax.ShapeDtypeStruct((5,), np.float32),
        },
        {},
        None,
        jax.ShapeDtypeStruct((), np.int32),
    )

    def put(path, shape, where):
        whole = np.asarray(np.random.default_rng(3).normal(size=shape.shape) * 9, shape.dtype)
        parts = []
        for device, index in where.devices_indices_map(shape.shape).items():
            part = np.array(whole[index])
            if device == flip and "kernel" in str(path):
                part.view(np.uint32).reshape(-1)[7] ^= 1 << 3
            parts.append(jax.device_put(part, device))
        return jax.make_array_from_single_device_arrays(shape.shape, where, parts)

    return jax.tree_util.tree_map_with_path(put, shapes, sharding.shardings(shapes, mesh))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (2, 2, 2, 1)])
def test_a_flipped_bit_is_found_and_named(sizes):
    mesh = mesh_of(sizes)
    good = make_state(mesh)
    check = ReplicaCheck(mesh, good, every=10)
    check.push(10, good)
    check.push(12, good)
    check.push(13, good, now=True)
    device = mesh.devices[(1, *[0] * (len(sizes) - 1))]
    bad = make_state(mesh, flip=device)
    check.push(19, bad)  # not asked for
    check.push(20, bad)
    check.push(21, bad)  # not read yet
    with pytest.raises(UserError) as caught:
        check.push(22, bad)
    named = f"device {device.id} of "
    assert "found other bits after step 20 on " in str(caught.value)
    assert named in str(caught.value)
    # With three copies or more the one that differs is known, with two both are named.
    assert (" or device " in str(caught.value)) == (sizes == (2, 4, 1) or len(sizes) == 4)
    with pytest.raises(UserError, match=named):
        ReplicaCheck(mesh, good, every=1000).push(30, bad, now=True)


def test_without_copies_there_is_nothing_to_check():
    alone = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    ReplicaCheck(alone, make_state(alone), every=1).push(1, make_state(alone), now=True)
    mesh = sharding.make_mesh(8, 1, 1)
    bad = make_state(mesh, flip=mesh.devices[3, 0, 0])
    ReplicaCheck(mesh, bad, every=0).push(1, bad, now=True)
