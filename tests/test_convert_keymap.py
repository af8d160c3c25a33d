import ml_dtypes
import numpy as np
import pytest

from microdit_jax.convert.keymap import (
    CONV,
    LINEAR,
    SAME,
    Rule,
    build_table,
    constant_weights,
    is_finite,
    patch_conv,
    to_params,
    to_tensors,
    torch_name,
)
from microdit_jax.errors import UserError
from microdit_jax.trees import flatten, unflatten

RULES = [
    Rule(r"conv/kernel", "conv.weight", CONV),
    Rule(r"patch/kernel", "patch.weight", patch_conv(channels=3, patch=2)),
    Rule(r"(.*)/kernel", r"\1.weight", LINEAR),
    Rule(r"(.*)/scale", lambda match: f"{match[1]}.weight", SAME),
]
EXPECTED = {
    "conv": {"kernel": np.zeros((3, 3, 4, 5))},
    "patch": {"kernel": np.zeros((12, 6))},
    "blocks_0": {"mlp_2": {"kernel": np.zeros((2, 7))}, "norm1": {"scale": np.zeros(2)}},
}
SHAPES = {
    "conv.weight": (5, 4, 3, 3),
    "patch.weight": (6, 3, 2, 2),
    "blocks.0.mlp.2.weight": (7, 2),
    "blocks.0.norm1.weight": (2,),
}


def tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(s, np.float32).astype(dtype) for k, s in SHAPES.items()}


def test_names():
    assert torch_name("blocks_12/attn/qkv.weight") == "blocks.12.attn.qkv.weight"
    assert torch_name("adaLN_modulation_1.bias") == "adaLN_modulation.1.bias"
    assert torch_name("y_proj/fc1.weight") == "y_proj.fc1.weight"


def test_table_and_layouts():
    table = build_table(RULES, EXPECTED)
    assert {e.torch_name: e.torch_shape for e in table} == SHAPES
    given = tensors()
    params = to_params(given, table)
    # A convolution of one position is a product with the flattened (channel, row, column) patch.
    image = np.random.default_rng(1).standard_normal((3, 2, 2))
    expected = np.einsum("dcpq,cpq->d", given["patch.weight"], image)
    np.testing.assert_allclose(image.reshape(-1) @ params["patch"]["kernel"], expected, rtol=1e-6)
    assert params["conv"]["kernel"][1, 2, 3, 4] == given["conv.weight"][4, 3, 1, 2]
    np.testing.assert_array_equal(
        params["blocks_0"]["mlp_2"]["kernel"], given["blocks.0.mlp.2.weight"].T
    )


def test_both_ways_bit_for_bit_and_without_copies():
    table, given = build_table(RULES, EXPECTED), tensors()
    params = to_params(given, table)
    back = to_tensors(params, table)
    for name, tensor in given.items():
        np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32))
    assert all(
        any(np.shares_memory(leaf, tensor) for tensor in given.values())
        for leaf in flatten(params).values()
    )


FUSED = [
    Rule(
        r"layers_(\d+)/ln_1/(qkv)/kernel",
        [rf"layers.\1.ln_1.{name}_0.weight" for name in "qkv"],
        LINEAR,
        exact=True,
    ),
    Rule(r"(.*)/bias", lambda match: f"{match[1]}.bias"),
]


def test_fused_parameters_both_ways_bit_for_bit():
    expected = {"layers_7": {"ln_1": {"qkv": {"kernel": np.zeros((2, 12))}}}}
    expected["fc_1"] = {"bias": np.zeros(5)}
    table = build_table(FUSED, expected)
    shapes = {e.torch_name: e.torch_shape for e in table}
    names = [f"layers.7.ln_1.{name}_0.weight" for name in "qkv"]  # exact: ln_1 stays one part
    assert shapes == dict.fromkeys(names, (4, 2)) | {"fc.1.bias": (5,)}
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    kernel = to_params(given, table)["layers_7"]["ln_1"]["qkv"]["kernel"]
    x = rng.standard_normal((3, 2), np.float32)
    separate = np.concatenate([x @ given[name].T for name in names], axis=1)
    np.testing.assert_allclose(x @ kernel, separate, rtol=1e-6)
    back = to_tensors(to_params(given, table), table)
    assert list(back) == list(shapes)
    for name, tensor in given.items():
        np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32))
    half = {name: tensor.astype(np.float16) for name, tensor in given.items()}
    assert to_params(half, table)["layers_7"]["ln_1"]["qkv"]["kernel"].dtype == np.float32


def test_faults_of_fused_parameters_name_the_tensor():
    table = build_table(FUSED, {"layers_0": {"ln_1": {"qkv": {"kernel": np.zeros((2, 12))}}}})
    given = {e.torch_name: np.zeros(e.torch_shape, np.float32) for e in table}
    del given["layers.0.ln_1.k_0.weight"]
    given["layers.0.ln_1.v_0.weight"] = np.zeros((2, 4), np.float32)
    with pytest.raises(UserError) as caught:
        to_params(given, table)
    assert "missing: layers.0.ln_1.k_0.weight (4, 2)" in str(caught.value)
    assert "ln_1.v_0.weight (expected (4, 2), found (2, 4))" in str(caught.value)
    with pytest.raises(ValueError, match="does not fall into 3 equal tensors"):
        build_table(FUSED, {"layers_0": {"ln_1": {"qkv": {"kernel": np.zeros((2, 10))}}}})


def test_half_precision_is_widened():
    for dtype in (np.float16, ml_dtypes.bfloat16):
        given = tensors(dtype)
        params = to_params(given, build_table(RULES, EXPECTED))
        scale = params["blocks_0"]["norm1"]["scale"]
        assert scale.dtype == np.float32
        np.testing.assert_array_equal(scale, given["blocks.0.norm1.weight"].astype(np.float32))


def test_all_faults_at_once():
    given = tensors()
    del given["conv.weight"]
    given["patch.weight"] = given["patch.weight"].reshape(6, 12)
    given["surplus"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as caught:
        to_params(given, build_table(RULES, EXPECTED), {"buffer": (1, 2)})
    message = str(caught.value)
    for part in (
        "missing: conv.weight (5, 4, 3, 3), buffer (1, 2)",
        "unexpected: surplus (3,)",
        "of another shape: patch.weight (expected (6, 3, 2, 2), found (6, 12))",
    ):
        assert part in message
    assert "\n" not in message


def test_a_square_kernel_must_still_be_the_named_one():
    # Shapes alone cannot tell (2, 2) from its transpose: the rule decides, not the shape.
    table = build_table(RULES, {"fc": {"kernel": np.zeros((2, 2))}})
    given = {"fc.weight": np.array([[1, 2], [3, 4]], np.float32)}
    np.testing.assert_array_equal(to_params(given, table)["fc"]["kernel"], [[1, 3], [2, 4]])


def test_faults_of_parameters_are_listed_too():
    table = build_table(RULES, EXPECTED)
    params = to_params(tensors(), table)
    params["blocks_0"]["mlp_2"] = {"bias": np.zeros(7, np.float32)}
    with pytest.raises(UserError, match="missing: blocks_0/mlp_2/kernel.*unexpected: .*mlp_2/bias"):
        to_tensors(params, table)


def test_faulty_rules_are_noticed():
    with pytest.raises(ValueError, match="no rule matches the parameter a/bias"):
        build_table(RULES, {"a": {"bias": np.zeros(2)}})
    doubled = [Rule(r"(.*)/(kernel|scale)", r"\1.weight")]
    with pytest.raises(ValueError, match=r"one tensor: a\.weight"):
        build_table(doubled, {"a": {"kernel": np.zeros(2), "scale": np.zeros(2)}})


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_values_are_named(dtype, bad):
    given = tensors(dtype)
    assert all(is_finite(tensor) for tensor in given.values())
    given["conv.weight"][4, 3, 2, 1] = bad
    given["blocks.0.mlp.2.weight"][6, 0] = bad
    table = build_table(RULES, EXPECTED)
    with pytest.raises(UserError, match=r"in 2 tensors: conv\.weight, blocks\.0\.mlp\.2\.weight;"):
        to_params(given, table)
    assert not np.isfinite(to_params(given, table, check_finite=False)["conv"]["kernel"]).all()


def test_finite_check_reaches_every_chunk(monkeypatch):
    monkeypatch.setattr("microdit_jax.convert.keymap.CHUNK", 64)
    for index in ((0, 0), (50, 3), (99, 6)):
        for turned in (False, True):
            array = np.zeros((100, 7), np.float32)
            array[index] = np.nan
            assert not is_finite(array.T if turned else array)
    assert is_finite(np.zeros((100, 7), np.float32)[:, ::2])
    assert is_finite(np.zeros((), np.float32))
    assert not is_finite(np.array(np.nan, np.float32)) and is_finite(np.zeros((0, 3), np.float32))


def test_weights_of_one_value_are_named():
    """Matrices and kernels, whatever their type; not biases, norms, single rows and empty ones."""
    half = np.full((2, 3, 1, 1), 0.5, ml_dtypes.float8_e4m3fn)
    zeros = np.zeros((64, 64), np.float32)
    almost = zeros.copy()
    almost[63, 62] = 1
    tensors = {
        "a": zeros,
        "b": half,
        "c": almost,
        "bias": np.zeros(4),
        "token": np.zeros((1, 1, 5)),
    }
    tensors |= {"none": np.zeros((0, 3)), "ids": np.ones((2, 2), np.int64), "not": almost.T}
    assert constant_weights(tensors) == ["a (all 0)", "b (all 0.5)"]


def test_flatten_and_unflatten():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
