"""Path rules, the golden specs of XL/2, the mesh, batches, the table.

After a change of the rules that is meant: python tests/test_sharding.py, and look at the diff.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from support.one_of_each import mesh_of

from microdit_jax import sharding
from microdit_jax.errors import UserError
from microdit_jax.models import moe
from microdit_jax.models.dit import DiT, MicroDiT_XL_2
from microdit_jax.training import optim, state_table
from microdit_jax.training import step as train_step

SPECS = GOLDEN / "xl2_partition_specs.json"


def abstract_mesh(data=2, fsdp=2, expert=2) -> AbstractMesh:
    return AbstractMesh((data, fsdp, expert), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


@functools.cache
def xl2_state(mesh):
    optimizer = optim.adamw(optim.learning_rate(1e-4))
    return train_step.abstract_state(DiT(MicroDiT_XL_2()), optimizer, mesh, with_ema=True)


def xl2_specs() -> dict[str, list]:
    """Path -> spec of every parameter of XL/2 on a 2x2x2 mesh; shapes alone are computed."""
    params = jax.tree_util.tree_flatten_with_path(xl2_state(abstract_mesh()).params)[0]
    return {"/".join(sharding.names(p)): list(leaf.sharding.spec) for p, leaf in params}


def test_every_spec_of_xl2():
    assert xl2_specs() == json.loads(SPECS.read_text())


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("blocks_0/attn/qkv/kernel", (1024, 3072), P(None, "fsdp")),
        ("blocks_0/attn/proj/kernel", (2048, 1024), P("fsdp")),
        ("blocks_0/mlp/w1/kernel", (1024, 1024), P(None, "fsdp")),  # the last among equals
        ("blocks_1/mlp/w1", (8, 1024, 2048), P("expert", None, "fsdp")),
        ("blocks_1/mlp/w2", (8, 2048, 1024), P("expert", "fsdp")),
        ("odd/kernel", (1022, 333), P("fsdp")),
        ("indivisible/kernel", (1023, 333), P()),
        ("blocks_0/attn/qkv/bias", (65536,), P()),
        ("blocks_1/mlp/gate/kernel", (1024, 8), P()),  # small
        ("step", (), P()),
    ],
)
def test_param_spec(path, shape, spec):
    assert sharding.param_spec(path.split("/"), shape, abstract_mesh()) == spec


def test_axes_of_size_one_are_not_named():
    path = ["blocks_1", "mlp", "w1"]
    for mesh, spec in [
        (abstract_mesh(8, 1, 1), P()),
        (abstract_mesh(1, 1, 8), P("expert")),
        (abstract_mesh(1, 8, 1), P(None, None, "fsdp")),
    ]:
        assert sharding.param_spec(path, (8, 512, 1024), mesh) == spec


def test_fsdp_wider_than_a_slice_is_two_axes():
    """A device's part of one axis of the weight: slices split what fsdp has split."""
    mesh = mesh_of((1, 4, 2, 1))
    assert mesh.shape == {"data": 1, "slices": 4, "fsdp": 2, "expert": 1}
    both = ("fsdp", "slices")
    for shape, spec in [
        ((64, 128), P(None, both)),
        ((64, 60), P(both)),
        ((60, 30), P("fsdp")),  # nothing divides by eight
        ((63, 33), P()),
    ]:
        assert sharding.param_spec(["kernel"], shape, mesh, replicate_below=0) == spec
    assert sharding.copied_axes(P(None, both), mesh) == ()
    assert sharding.copied_axes(P("fsdp"), mesh) == ("slices",)
    only_across = mesh_of((1, 8, 1, 1))
    assert sharding.param_spec(["kernel"], (64, 128), only_across) == P()
    assert sharding.param_spec(["kernel"], (256, 128), only_across) == P("slices")


def test_experts_must_divide():
    with pytest.raises(UserError, match="must divide the 8 experts of a/w1, found expert=16"):
        sharding.param_spec(["a", "w1"], (8, 64, 64), abstract_mesh(1, 1, 16))


def test_optimiser_and_average_are_sharded_like_the_weights():
    state = xl2_state(abstract_mesh())
    shardings = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    adam = state.opt_state[1][0]
    for tree in (adam.mu, adam.nu, state.ema):
        assert [leaf.sharding for leaf in jax.tree.leaves(tree)] == shardings
    assert {sharding.spec for sharding in shardings} == {
        P(), P("fsdp"), P(None, "fsdp"), P("expert", "fsdp"), P("expert", None, "fsdp")
    }  # fmt: skip


def test_make_mesh():
    assert sharding.make_mesh().shape == {"data": 8, "fsdp": 1, "expert": 1}
    mesh = sharding.make_mesh(2, -1, 2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "expert": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.make_mesh(devices=jax.devices()[:2]).size == 2
    assert moe.EXPERT_AXIS in mesh.axis_names


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, 1), "data=2, fsdp=2, expert=1 takes 4 devices, found 8"),
        ((-1, 3, 1), "takes a multiple of 3 devices, found 8; choose sizes whose product is 8"),
        ((-1, -1, 1), "at most one of them -1"),
        ((-1, 0, 1), "must be positive"),
    ],
)
def test_bad_mesh_sizes(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(*sizes)


def test_put_batch():
    mesh = sharding.make_mesh(2, 2, 2)
    batch = {"latents": np.arange(48.0, dtype=np.float32).reshape(16, 3), "draw": np.int32(7)}
    placed = sharding.put_batch(batch, mesh)
    np.testing.assert_array_equal(placed["latents"], batch["latents"])
    np.testing.assert_array_equal(placed["position"], np.arange(16))
    assert {s.data.shape for s in placed["latents"].addressable_shards} == {(2, 3)}
    assert placed["draw"].is_fully_replicated and placed["draw"] == 7
    with pytest.raises(UserError, match="multiple of 8 devices, found {'latents': 12}"):
        sharding.put_batch({"latents": np.zeros((12, 3))}, mesh)


def test_table_counts_what_a_device_holds():
    state = xl2_state(abstract_mesh())
    lines = state_table.table(state, abstract_mesh()).splitlines()
    assert lines[0].startswith("mesh: data 2 x fsdp 2 x expert 2")
    rows = {line[:44].strip(): line[44:].replace(",", "").split() for line in lines[2:]}
    assert rows["total"][1] == "1165442320"
    here = sum(math.prod(p.sharding.shard_shape(p.shape)) for p in jax.tree.leaves(state.params))
    assert rows["total"][2] == str(here)
    params, moments, ema = map(float, rows["total"][3:])
    np.testing.assert_allclose([params, moments, ema], np.array([1, 2, 1]) * here * 4 / 2**20, 1e-4)
    groups = [r for name, r in rows.items() if name != "total"]
    assert "counters" not in rows and len(groups) == 6
    for column in (0, 1, 2):
        assert sum(int(r[column]) for r in groups) == int(rows["total"][column])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes, split", [((2, 2, 2), "fsdp"), ((1, 2, 2, 2), ("fsdp", "slices"))], ids=str
)
def test_gathered_and_summed_inside_shard_map(sizes, split, dtype):
    """Whole weights and true sums, against the same on whole arrays."""
    mesh = mesh_of(sizes)
    shapes = {"w": (4, 8), "v": (3,), "w1": (2, 4, 2)}
    weights = {k: jnp.asarray(np.random.default_rng(1).normal(size=s)) for k, s in shapes.items()}
    specs = sharding.specs(weights, mesh, replicate_below=0)
    assert specs == {"w": P(None, split), "v": P(), "w1": P("expert", split)}
    rtol = 1e-6 if dtype == "float32" else 2**-8  # rounded once for each of the two axes

    def gather_and_sum(shards, row):
        whole = sharding.gather(shards, specs)
        grads = jax.tree.map(lambda w: w * row[0], whole)
        axes = sharding.SPLIT_AXES
        return sharding.sum_rest(sharding.scatter_sum(grads, specs, axes=axes, dtype=dtype), specs)

    rows = jnp.arange(8.0)
    out = jax.jit(
        jax.shard_map(
            gather_and_sum,
            mesh=mesh,
            in_specs=(specs, sharding.batch_spec(mesh)),
            out_specs=specs,
            check_vma=False,
        )
    )(weights, rows)
    for name in ("w", "v"):
        np.testing.assert_allclose(out[name], weights[name] * 28, rtol=rtol)
    # An expert's gradient is the sum over the devices that hold the expert: tokens have travelled
    # there already.
    np.testing.assert_allclose(out["w1"][0], weights["w1"][0] * (0 + 2 + 4 + 6), rtol=rtol)
    np.testing.assert_allclose(out["w1"][1], weights["w1"][1] * (1 + 3 + 5 + 7), rtol=rtol)


@pytest.mark.parametrize("dtype, collective", [("float32", "reduce"), ("bfloat16", "all_to_all")])
def test_gradients_are_summed_in_float32(dtype, collective):
    """256 and seven ones are 263; in bfloat16, whose numbers are 2 apart there, they stay 256.

    They are so too where they travel in bfloat16.
    """
    mesh, specs = sharding.make_mesh(1, 8, 1), {"w": P("fsdp")}
    grads = jnp.ones((8, 8, 2), jnp.bfloat16).at[0].set(256)  # (device, 8, 2)

    def add(grads):
        summed = sharding.scatter_sum({"w": grads[0]}, specs, dtype=dtype)
        return sharding.sum_rest(summed, specs), sharding.norm(summed, specs)

    program = jax.jit(
        jax.shard_map(
            add,
            mesh=mesh,
            in_specs=sharding.batch_spec(mesh),
            out_specs=(specs, P()),
            check_vma=False,
        )
    )
    sent = [line for line in program.lower(grads).as_text().splitlines() if collective in line]
    assert any("bf16" in line for line in sent) == (dtype == "bfloat16")
    found, norm = program(grads)
    assert found["w"].dtype == jnp.float32
    np.testing.assert_array_equal(found["w"], np.full((8, 2), 263, np.float32))
    np.testing.assert_allclose(norm, 263 * 4, rtol=1e-6)


def test_on_each_device_gathers_weights_and_splits_rows():
    """The result on a mesh is that of one device, and `cast` acts before the all-gather."""
    params = {"w": jnp.arange(64.0).reshape(8, 8), "w1": jnp.ones((2, 4, 8))}
    rows, scale = {"x": jnp.arange(16.0)}, jnp.float32(3)

    def function(params, rows, scale):
        kernel = params["w"].astype(jnp.float32)
        assert kernel.shape == (8, 8)
        return rows["x"] * kernel.sum() * scale

    def on(mesh, cast=None):
        return sharding.on_each_device(
            function, mesh, params, (rows,), (scale,), cast=cast, replicate_below=1
        )

    expected = on(None)
    np.testing.assert_array_equal(expected, np.arange(16) * 2016 * 3)
    mesh = sharding.make_mesh(2, 2, 2)
    np.testing.assert_array_equal(jax.jit(lambda: on(mesh))(), expected)
    lowered = jax.jit(
        lambda: on(mesh, lambda shards: jax.tree.map(lambda w: w.astype(jnp.bfloat16), shards))
    ).lower()
    gathers = [line for line in lowered.as_text().splitlines() if "all_gather" in line]
    assert gathers and all("bf16" in line for line in gathers)


if __name__ == "__main__":
    lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in xl2_specs().items())
    SPECS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
