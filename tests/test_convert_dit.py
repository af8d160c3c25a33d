import dataclasses
import json
import math
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import load_golden
from support.synthetic import synthetic_dit

from microdit_jax.convert.dit import config_from_dict, from_torch, infer_config, to_torch
from microdit_jax.convert.dit_infer import interp_scale
from microdit_jax.convert.dit_table import buffer_shapes, rename_table
from microdit_jax.errors import UserError
from microdit_jax.models.dit import DiTConfig, MicroDiT_Tiny_2, MicroDiT_XL_2
from microdit_jax.models.layers import sincos_pos_embed
from microdit_jax.trees import flatten

GOLDEN = pathlib.Path(__file__).parent / "golden"
XL2_512 = MicroDiT_XL_2(input_size=64, pos_interp_scale=2.0)
SEEDS = {"dit_small": 7, "dit_mixer_same_dim": 11, "dit_16ch_interp2": 13}
SMALL = DiTConfig(
    input_size=8,
    dim=32,
    depth=3,
    head_dim=8,
    multiple_of=16,
    caption_channels=24,
    qkv_multipliers=(0.5, 1.0, 1.0),
    ffn_multipliers=(1.0, 2.0, 3.0),
    patch_mixer_depth=2,
    patch_mixer_dim=24,
    patch_mixer_mlp_ratio=4.0,
    use_bias=False,
    num_experts=4,
    expert_capacity=2.0,
)


def shapes_only(config: DiTConfig) -> dict[str, np.ndarray]:
    """A state dict of the right shapes that takes no memory; only pos_embed is real."""
    wanted = shapes(config) | buffer_shapes(config)
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in wanted.items()}
    pos_embed = sincos_pos_embed(config.dim, config.grid, config.pos_interp_scale)
    return tensors | {"pos_embed": pos_embed[None]}


def tensors_of(golden) -> dict[str, np.ndarray]:
    return {
        key.removeprefix("state_dict/"): golden.arrays[key] for key in golden.keys("state_dict/")
    }


def shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    return {entry.torch_name: entry.torch_shape for entry in rename_table(config)}


def test_both_ways_bit_for_bit(golden):
    tensors = tensors_of(golden)
    for config in (golden.config, infer_config(tensors)):
        back = to_torch(from_torch(tensors, config), config)
        assert set(back) == set(tensors)
        for name, tensor in tensors.items():
            assert back[name].dtype == np.float32
            np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32))


def test_the_tree_is_what_the_network_makes(golden):
    latent = (1, golden.config.input_size, golden.config.input_size, golden.config.in_channels)
    inputs = [latent, (1,), (1, 2, golden.config.caption_channels)]
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in inputs]
    expected = jax.eval_shape(golden.model.init, jax.random.key(0), *inputs)["params"]
    params = from_torch(tensors_of(golden), golden.config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)


def test_configs_are_read_off_the_files(golden):
    found, config = infer_config(tensors_of(golden)), golden.config
    computed = ("qkv_multipliers", "ffn_multipliers")  # other ratios may give the same widths
    same = [f.name for f in dataclasses.fields(DiTConfig) if f.name not in computed]
    assert {n: getattr(found, n) for n in same} == {n: getattr(config, n) for n in same}
    assert shapes(found) == shapes(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_patch_mixer": False, "experts_every_n": 9},  # no experts at all
        {"experts_every_n": 1, "patch_mixer_mlp_ratio": 2.7, "multiple_of": 8},
        {
            "experts_every_n": 3,
            "depth": 4,
            "qkv_multipliers": (0.5, 1.3),
            "ffn_multipliers": (1.0, 2.0),
        },
        {"multiple_of": 1, "ffn_multipliers": (0.7, 1.9, 2.3), "patch_mixer_mlp_ratio": 1.7},
        {"use_bias": True, "patch_size": 4, "in_channels": 3, "num_experts": 5},
        {"input_size": 16, "pos_interp_scale": 4 / 3, "patch_mixer_qkv_ratio": 0.5},
    ],
    ids=str,
)
def test_custom_networks(changes):
    config = dataclasses.replace(SMALL, **changes)
    tensors = shapes_only(config)
    found = infer_config(tensors)
    assert shapes(found) == shapes(config)
    assert found.head_dim == config.head_dim
    assert found.pos_interp_scale == config.pos_interp_scale
    experts = [b.is_moe for b in config.mixer_blocks() + config.backbone_blocks()]
    assert [b.is_moe for b in found.mixer_blocks() + found.backbone_blocks()] == experts
    from_torch(tensors, found)


def test_released_sizes_are_recognised():
    for config in (XL2_512, MicroDiT_Tiny_2(caption_channels=4096, in_channels=16)):
        assert infer_config(shapes_only(config)) == config


def test_xl2_has_the_references_tensors():
    names = json.loads((GOLDEN / "microdit_xl2.json").read_text())
    expected = {name: tuple(shape) for name, (shape, _) in names.items()}
    assert shapes(XL2_512) | buffer_shapes(XL2_512) == expected | {"pos_embed": (1, 1024, 1024)}
    sizes = [math.prod(entry.flax_shape) for entry in rename_table(XL2_512)]
    assert sum(sizes) == 1_165_442_320


def test_a_damaged_xl2_is_still_an_xl2():
    tensors = shapes_only(XL2_512)
    del tensors["blocks.3.attn.qkv.weight"]
    tensors["blocks.5.mlp.w1"] = tensors["blocks.5.mlp.w1"][:, :-1]
    assert infer_config(tensors) == XL2_512


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5, 1.5, 4 / 3])
def test_interpolation_scale_in_any_precision(dtype, scale):
    for dim, grid in ((32, 6), (1024, 16)):
        table = sincos_pos_embed(dim, grid, scale)[None].astype(dtype)
        assert interp_scale(table) == scale


def test_no_scale_gives_a_trained_position_embedding():
    noise = np.random.default_rng(0).standard_normal((1, 16, 32), np.float32)
    assert interp_scale(noise) is None
    tensors = synthetic_dit(SMALL, 0) | {"pos_embed": noise}
    with pytest.raises(UserError, match="that no scale gives"):
        from_torch(tensors, infer_config(tensors))


def test_head_dim_that_shapes_leave_open():
    config = dataclasses.replace(
        SMALL, dim=256, patch_mixer_dim=256, head_dim=64, qkv_multipliers=(1.0, 1.0, 1.0)
    )
    tensors = shapes_only(config)
    with pytest.raises(UserError, match="it divides 256; convert it first: .* --head_dim"):
        infer_config(tensors)
    assert infer_config(tensors, head_dim=64).head_dim == 64
    with pytest.raises(UserError, match="divides 256, found 48"):
        infer_config(tensors, head_dim=48)


def test_expert_capacity_is_the_callers():
    assert infer_config(shapes_only(SMALL), expert_capacity=1.5).expert_capacity == 1.5


def test_all_faults_at_once():
    tensors = tensors_of(load_golden("dit_small"))
    config = infer_config(tensors)
    del tensors["blocks.1.mlp.w1"]
    tensors["blocks.0.attn.qkv.weight"] = tensors["blocks.0.attn.qkv.weight"].T
    tensors["decoder.weight"] = np.zeros((2, 3), np.float32)
    with pytest.raises(UserError) as caught:
        from_torch(tensors, config)
    for part in (
        "missing: blocks.1.mlp.w1 (4, 32, 64)",
        "unexpected: decoder.weight (2, 3)",
        "blocks.0.attn.qkv.weight (expected (48, 32), found (32, 48))",
    ):
        assert part in str(caught.value)


def test_not_finite_weights_are_named():
    tensors = tensors_of(load_golden("dit_small"))
    for name in ("blocks.1.mlp.w2", "final_layer.linear.bias"):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[5] = np.nan
    with pytest.raises(
        UserError, match=r"2 tensors: blocks\.1\.mlp\.w2, final_layer\.linear\.bias"
    ):
        from_torch(tensors, infer_config(tensors))


def test_constants_are_checked():
    golden = load_golden("dit_16ch_interp2")
    tensors = tensors_of(golden)
    other = dataclasses.replace(golden.config, pos_interp_scale=1.0)
    with pytest.raises(UserError, match=r"pos_interp_scale 1\.0, found that of 2\.0; set"):
        from_torch(tensors, other)
    with pytest.raises(UserError, match="mask_token of zeros"):
        from_torch(tensors | {"mask_token": tensors["mask_token"] + 1}, golden.config)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_checkpoints(dtype):
    tensors = {k: v.astype(dtype) for k, v in tensors_of(load_golden("dit_small")).items()}
    params = from_torch(tensors, infer_config(tensors))
    assert {leaf.dtype for leaf in flatten(params).values()} == {np.dtype(np.float32)}
    weight = tensors["blocks.0.attn.qkv.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["blocks_0"]["attn"]["qkv"]["kernel"], weight.T)


def test_what_is_not_a_microdit():
    with pytest.raises(UserError, match=r"found none of .*pos_embed.*name its kind"):
        infer_config({"encoder.weight": np.zeros((2, 2), np.float32)})
    tensors = tensors_of(load_golden("dit_small"))
    with pytest.raises(UserError, match="square grid"):
        infer_config(tensors | {"pos_embed": np.zeros((1, 15, 32), np.float32)})
    with pytest.raises(UserError, match="expected pos_embed of a floating type, found int64"):
        infer_config(tensors | {"pos_embed": np.zeros((1, 16, 32), np.int64)})
    assert infer_config(tensors | {"pos_embed": np.full((1, 16, 32), np.nan, np.float32)})
    experts = {k: v for k, v in tensors.items() if not k.startswith("patch_mixer.1.mlp")}
    with pytest.raises(
        UserError, match=r"experts in every n-th.*blocks \[1\] and patch_mixer \[\]"
    ):
        infer_config(experts)


def test_unknown_config_fields():
    fields = dataclasses.asdict(SMALL)
    assert config_from_dict(json.loads(json.dumps(fields))) == SMALL
    with pytest.raises(UserError, match="found widht; correct"):
        config_from_dict(fields | {"widht": 3})


def test_synthetic_weights_are_those_of_the_golden_files():
    for name, seed in SEEDS.items():
        golden = load_golden(name)
        made = synthetic_dit(golden.config, seed)
        for tensor, expected in tensors_of(golden).items():
            np.testing.assert_array_equal(made[tensor], expected)
