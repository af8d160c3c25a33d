"""The whole network against the recorded reference, and its own promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2, tiny_model

from microdit_jax import models
from microdit_jax.errors import UserError
from microdit_jax.models import dit, masking
from microdit_jax.models.layers import sincos_pos_embed, timestep_embedding
from microdit_jax.trees import flatten


def forward(golden, params=None, *, mask_ratio=0.0, jit=True, **changes):
    model = dit.DiT(dataclasses.replace(golden.config, **changes))

    def apply(params, x, t, y, u):
        return model.apply({"params": params}, x, t, y, mask_noise=u, mask_ratio=mask_ratio)

    apply = jax.jit(apply) if jit else apply
    params = golden.params if params is None else params
    return apply(params, golden["x"], golden["t"], golden["y"], golden["mask_noise"])


def test_every_activation_equals_the_reference(golden):
    @jax.jit
    def run(params, *inputs):
        return golden.model.apply({"params": params}, *inputs, capture_intermediates=True)

    (sample, mask), state = run(golden.params, golden["x"], golden["t"], golden["y"])
    assert mask is None
    assert relative_l2(sample, golden["sample"]) < 5e-5
    for key in golden.keys("activation/"):
        name = key.removeprefix("activation/").replace(".", "_")
        expected = np.asarray(golden.arrays[key])
        expected = expected[:, 0] if expected.ndim == 4 else expected
        assert relative_l2(state["intermediates"][name]["__call__"][0], expected) < 2e-5, key


def test_small_file_records_every_submodule(golden_small):
    assert len(golden_small.keys("activation/")) == 13


def test_masked_run_keeps_the_same_tokens(golden):
    runs = {}
    for dispatch in ("gather", "onehot"):
        sample, mask = forward(golden, mask_ratio=0.75, moe_dispatch=dispatch)
        np.testing.assert_array_equal(mask, golden["mask"])
        assert relative_l2(sample, golden["sample_masked"]) < 5e-5
        runs[dispatch] = sample
    assert relative_l2(runs["gather"], runs["onehot"]) < 1e-6


def test_unmasked_dispatches_and_eager_runs_agree(golden_small):
    gathered, _ = forward(golden_small, moe_dispatch="gather")
    onehot, _ = forward(golden_small, moe_dispatch="onehot")
    eager, _ = forward(golden_small, jit=False)
    assert relative_l2(gathered, onehot) < 1e-6
    assert relative_l2(gathered, eager) < 2e-6


def test_bfloat16_stays_near(golden):
    """Rounding flips near ties of expert choice, which moves whole tokens; so two measures.

    The reference's own bfloat16 autocast is 0.05, 0.03 and 0.11 off its float32 on these files.
    """
    # Where every expert takes every token there is no choice to flip.
    everything = {"expert_capacity": float(golden.config.num_experts)}
    exact, _ = forward(golden, **everything)
    rounded, _ = forward(golden, dtype="bfloat16", **everything)
    assert rounded.dtype == jnp.float32
    assert relative_l2(rounded, exact) < 2e-2
    sample, _ = forward(golden, dtype="bfloat16")
    error = jnp.abs(sample - golden["sample"]) / jnp.std(golden["sample"])
    assert float(jnp.median(error)) < 2e-2


def test_remat_changes_no_gradient():
    config = tiny_model().config
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (2, 8, 8, 4))
    t, y = jax.random.normal(keys[1], (2,)), jax.random.normal(keys[2], (2, 7, 24))
    u = masking.uniform_noise(keys[3], 2, 16)
    # Zero-initialised branches have no gradient to compare: move every parameter.
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(keys[4], p.shape),
        jax.jit(tiny_model().init)(keys[4], x, t, y)["params"],
    )

    def gradient(remat):
        model = dit.DiT(dataclasses.replace(config, remat=remat))

        def loss(params):
            args = (x, t, y)
            sample, _ = model.apply({"params": params}, *args, mask_noise=u, mask_ratio=0.5)
            return jnp.square(sample).mean()

        return jax.jit(jax.grad(loss))(params)

    plain = gradient("none")
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain)) > 0
    for remat in ("block", "dots"):
        remade = gradient(remat)
        errors = jax.tree.map(relative_l2, remade, plain)
        assert max(jax.tree.leaves(errors)) < 1e-4


def test_encoding_captions_ahead_changes_nothing(golden_small):
    @jax.jit
    def run(params, x, t, y):
        variables = {"params": params}
        caption = golden_small.model.apply(variables, y, method="encode_caption")
        return golden_small.model.apply(variables, x, t, caption, method="predict")[0], caption

    inputs = (golden_small[key] for key in ("x", "t", "y"))
    sample, caption = run(golden_small.params, *inputs)
    assert relative_l2(sample, golden_small["sample"]) < 5e-5
    config = golden_small.config
    assert len(caption.keys_values) == config.depth + config.patch_mixer_depth


@pytest.mark.parametrize(
    "config, parameters",
    [
        (dit.MicroDiT_XL_2(), 1_165_442_320),
        (dit.MicroDiT_XL_2(in_channels=16), 1_165_540_672),
        (dit.MicroDiT_Tiny_2(), 200_692_752),
    ],
)
def test_parameter_counts_of_the_paper(config, parameters):
    shapes = dit.abstract_params(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_initialisation_statistics():
    config = dit.DiTConfig(
        input_size=8, dim=128, depth=4, head_dim=32, multiple_of=64, caption_channels=96,
        patch_mixer_depth=2, patch_mixer_dim=96, patch_mixer_mlp_ratio=4.0, use_bias=False,
        qkv_multipliers=(1.0,) * 4, ffn_multipliers=(4.0,) * 4, expert_capacity=2.0,
    )  # fmt: skip
    params = jax.jit(lambda key: dit.init_params(config, key))(jax.random.key(0))

    def std(*path):
        leaf = params
        for name in path:
            leaf = leaf[name]
        return float(jnp.std(leaf)), float(jnp.abs(leaf).max())

    def near(path, expected):
        found = std(*path.split("/"))[0]
        assert abs(found / expected - 1) < 0.06, (path, found, expected)

    for path in ("t_embedder/mlp_0", "y_embedder/y_proj/fc1", "pooled_y_emb_process/fc2",
                 "blocks_2/attn/qkv", "blocks_2/cross_attn/kv_linear", "blocks_2/mlp/w1",
                 "y_emb_preprocess/attn/qkv", "y_emb_preprocess/mlp/w2"):  # fmt: skip
        near(path + "/kernel", 0.02)
    near("blocks_1/mlp/w1", 0.02)
    near("blocks_1/mlp/gate/kernel", 0.02)
    for i in range(4):  # backbone block i: 0.02 / sqrt(2 (i + 1))
        near(f"blocks_{i}/attn/proj/kernel", 0.02 / (2 * (i + 1)) ** 0.5)
        near(f"blocks_{i}/cross_attn/proj/kernel", 0.02 / (2 * (i + 1)) ** 0.5)
    near("blocks_1/mlp/w2", 0.02 / 4**0.5)
    near("blocks_2/mlp/w3/kernel", 0.02 / 6**0.5)
    near("blocks_2/mlp/w2/kernel", 0.02 / 6**0.5)
    for path in ("attn/proj/kernel", "mlp/w3/kernel"):  # mixer: 0.02 / sqrt(2 depth)
        near("patch_mixer_0/" + path, 0.02 / 8**0.5)
    near("patch_mixer_1/mlp/w2", 0.02 / 8**0.5)
    # Xavier uniform: std = limit / sqrt(3)
    limit = (6 / (128 + 16)) ** 0.5
    near("x_embedder/proj/kernel", limit / 3**0.5)
    assert std("x_embedder", "proj", "kernel")[1] <= limit
    near("patch_mixer_map_xin_1/kernel", (2 / (128 + 96)) ** 0.5)
    bias_std, bias_max = std("x_embedder", "proj", "bias")
    assert bias_max <= 0.25 and 0.12 < bias_std < 0.17  # U(+-1/sqrt(16)): std 0.144
    zero = ("blocks_0/adaLN_modulation_1/kernel", "patch_mixer_0/adaLN_modulation_1/kernel",
            "final_layer/adaLN_modulation_1/kernel", "final_layer/linear/kernel",
            "final_layer/linear/bias", "t_embedder/mlp_0/bias",
            "y_emb_preprocess/attn/proj/kernel", "y_emb_preprocess/mlp/w3/kernel")  # fmt: skip
    for path in zero:
        assert std(*path.split("/"))[1] == 0, path
    assert (params["blocks_0"]["norm1"]["scale"] == 1).all()
    assert "bias" not in params["blocks_0"]["attn"]["qkv"]


def test_init_std_is_followed():
    config = dataclasses.replace(tiny_model().config, init_std=0.1)
    params = jax.jit(lambda key: dit.init_params(config, key))(jax.random.key(0))
    qkv = params["blocks_0"]["attn"]["qkv"]["kernel"]
    assert abs(float(jnp.std(qkv)) / 0.1 - 1) < 0.06
    proj = params["blocks_0"]["cross_attn"]["proj"]["kernel"]
    assert abs(float(jnp.std(proj)) / (0.1 / 2**0.5) - 1) < 0.1


@pytest.mark.parametrize(("depth_init", "depths"), [(True, (1, 2, 3)), (False, (3, 3, 3))])
def test_depth_init_decides_how_blocks_start(depth_init, depths):
    """Output projections of block i have deviation init_std / sqrt(2 (i + 1)), or all are equal."""
    config = dataclasses.replace(
        tiny_model().config, depth=3, init_std=0.1, depth_init=depth_init,
        qkv_multipliers=(1.0,), ffn_multipliers=(1.0,),
    )  # fmt: skip
    model = dit.DiT(config).bind({})
    found = [
        float(block.out_init(jax.random.key(0), (100, 100), jnp.float32).std())
        for block in model.blocks
    ]
    np.testing.assert_allclose(found, [0.1 / (2 * depth) ** 0.5 for depth in depths], rtol=0.03)
    mixer = model.patch_mixer[0].out_init(jax.random.key(0), (100, 100), jnp.float32).std()
    np.testing.assert_allclose(mixer, 0.1 / 6**0.5, rtol=0.03)


def test_matrices_that_multiply_in_float32_are_not_cast():
    config = dataclasses.replace(tiny_model().config, dtype="bfloat16")
    params = dit.abstract_params(config)
    cast = flatten(jax.eval_shape(lambda p: dit.cast_matrices(p, config), params))
    kept = {path for path, leaf in cast.items() if leaf.dtype == jnp.float32 and leaf.ndim > 1}
    spared = ("t_embedder/", "pooled_y_emb_process/", "adaLN_modulation_1/", "mlp/gate/")
    assert kept == {path for path in cast if any(s in path for s in spared)
                    and cast[path].ndim > 1}  # fmt: skip
    assert len(kept) == 2 + 2 + 5 + 1


def test_the_table_of_architectures():
    assert models.ARCHES == {
        "MicroDiT_XL_2": dit.MicroDiT_XL_2, "MicroDiT_Tiny_2": dit.MicroDiT_Tiny_2
    }  # fmt: skip
    assert models.SHORT_ARCHES == {"XL_2": "MicroDiT_XL_2", "Tiny_2": "MicroDiT_Tiny_2"}
    assert models.arch_of(1024, 28) == models.arch_of(1024, 28, 768) == "MicroDiT_XL_2"
    assert models.arch_of(512, 16) == "MicroDiT_Tiny_2"
    assert models.arch_of(512, 28) is models.arch_of(1024, 28, 512) is None


@pytest.mark.parametrize("case", ["xl2_256", "xl2_512", "odd"])
def test_position_embedding(case):
    with np.load("tests/golden/pos_embed.npz") as file:
        width, grid, scale, _ = file[f"{case}_args"]
        rows, total = file[f"{case}_rows"], float(file[f"{case}_sum"])
    table = sincos_pos_embed(int(width), int(grid), float(scale))
    np.testing.assert_array_equal(table[:: max(1, len(table) // 16)], rows)
    assert abs(table.astype(np.float64).sum() / total - 1) < 1e-8


def test_timestep_features():
    with np.load("tests/golden/timestep_embed.npz") as file:
        features = timestep_embedding(jnp.asarray(file["t"]))
        assert relative_l2(features, file["emb512"]) < 2e-5


def test_moe_pattern_of_the_paper():
    config = dit.MicroDiT_XL_2()
    backbone = [i for i, block in enumerate(config.backbone_blocks()) if block.is_moe]
    mixer = [i for i, block in enumerate(config.mixer_blocks()) if block.is_moe]
    assert backbone == list(range(1, 27, 2)) and mixer == [1, 3, 5]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_dim": 7}, "head_dim"),
        ({"attention": "flash"}, "attention must be one of xla, looped, cudnn, splash"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"qkv_multipliers": (1.0, 1.0)}, "multipliers"),
        ({"ffn_multipliers": (1.0,) * 3, "qkv_multipliers": (1.0,) * 3}, "depth divisible"),
        ({"input_size": 7}, "multiple of patch_size"),
        ({"patch_size": 0}, "patch_size must be above 0, found 0"),
        ({"num_experts": 0}, "num_experts must be above 0"),
        ({"experts_every_n": 0}, "experts_every_n must be above 0"),
        ({"pos_interp_scale": float("nan")}, "pos_interp_scale must be above 0, found nan"),
        ({"expert_capacity": 5.0}, "expert_capacity of at most num_experts"),
    ],
)
def test_bad_configs_are_refused(golden_small, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(golden_small.config, **changes)


def test_options_come_before_a_sizes_own():
    config = dit.MicroDiT_XL_2(depth=4, use_bias=True, patch_mixer_mlp_ratio=2.0)
    assert (config.depth, config.use_bias, config.patch_mixer_mlp_ratio) == (4, True, 2.0)
    assert config.qkv_multipliers == tuple(np.linspace(0.5, 1.0, 4)) and config.dim == 1024
    with pytest.raises(UserError, match="depth must be above 0, found -1"):
        dit.MicroDiT_Tiny_2(depth=-1)


def test_bad_inputs_are_refused(golden_small):
    variables = {"params": golden_small.params}
    x, t, y = (golden_small[key] for key in ("x", "t", "y"))
    with pytest.raises(UserError, match=r"latents must be \(n, 8, 8, 4\), found \(2, 4, 8, 4\)"):
        golden_small.model.apply(variables, x[:, ::2], t, y)
    with pytest.raises(UserError, match="input_size and in_channels"):
        golden_small.model.apply(variables, x[..., :3], t, y)
    with pytest.raises(UserError, match="text encoder"):
        golden_small.model.apply(variables, x, t, y[..., :5])
    for ratio in (1.0, -0.1, 1.5):
        with pytest.raises(UserError, match=r"mask_ratio must be in \[0, 1\)"):
            golden_small.model.apply(variables, x, t, y, mask_ratio=ratio)
    with pytest.raises(UserError, match="uniform_noise"):
        golden_small.model.apply(variables, x, t, y, mask_ratio=0.75)
    with pytest.raises(UserError, match="keeps none of 16 tokens"):
        masking.num_kept(16, 0.99)
