import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support.checkpoints import abstract, assert_same, make_state, mesh, split

from microdit_jax.checkpoints import packing, restore
from microdit_jax.checkpoints.packing import SMALL, pack, read_index, unpack
from microdit_jax.trees import flatten


def odd_state() -> dict:
    """Types and shapes whose bytes are not a multiple of each other's."""
    return {
        "params": {
            "a": jnp.arange(3, dtype=jnp.bfloat16),
            "b": jnp.arange(10, dtype=jnp.int8).reshape(2, 5),
            "c": jnp.float32(0.1),
            "d": jnp.zeros((0, 4)),
            "e": jnp.arange(6, dtype=jnp.float32).reshape(2, 3),
        },
        "step": jnp.int32(7),
    }


def test_pack_and_unpack():
    state = odd_state()
    arrays, metadata = pack(state)
    index = read_index(metadata)
    assert set(flatten(arrays)) == {"packed/params", "packed/step"}
    assert arrays["packed"]["params"].shape == (6 + 10 + 4 + 0 + 24,)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    for path, leaf in flatten(abstract(state, lambda _: one)).items():
        found = unpack(flatten(arrays)[packing.row_of(path)], index[path], leaf)
        assert_same(found, flatten(state)[path])
        assert found.sharding == one


def test_the_large_and_the_scattered_stay_arrays():
    """Large is a matter of bytes."""
    state = {"p": {"large": jnp.zeros(SMALL // 4), "small": jnp.zeros(SMALL // 4 - 1)}}
    arrays, metadata = pack(state)
    assert arrays["p"]["large"] is state["p"]["large"]
    assert list(read_index(metadata)) == ["p/small"]


def test_a_packed_copy_outlives_the_state():
    state = odd_state()
    arrays, _ = pack(state)
    before = arrays["packed"]["params"].copy()
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    np.testing.assert_array_equal(arrays["packed"]["params"], before)


def test_rows_of_an_earlier_call_are_written_over():
    memory = {}
    old = {"params": {"a": jnp.arange(3), "b": jnp.ones(2)}, "step": jnp.int32(1)}
    first, _ = pack(old, memory)
    row = first["packed"]["params"]
    new = {"params": {"a": jnp.arange(3) + 7, "b": jnp.zeros(2)}, "step": jnp.int32(2)}
    second, _ = pack(new, memory)
    assert second["packed"]["params"] is row
    np.testing.assert_array_equal(row, pack(new)[0]["packed"]["params"])
    larger, _ = pack({"params": {"a": jnp.arange(4)}}, memory)
    assert larger["packed"]["params"].size == 16 and list(larger["packed"]) == ["params"]


@pytest.mark.parametrize("partial", [False, True])
def test_checkpoints_that_pack_nothing_are_read(tmp_path, partial):
    """As those of earlier versions, with every array by itself, empty optimiser states among."""
    state = make_state(3)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    places = lambda leaf: split(leaf, mesh(2, 2, 2))  # noqa: E731
    if partial:
        found = restore.restore_state(tmp_path, {"ema": abstract(state.ema, places)}, partial=True)
        assert_same(found["ema"], state.ema)
    else:
        found = restore.restore_state(tmp_path, abstract(state, places), partial=False)
        assert_same(found, state)
