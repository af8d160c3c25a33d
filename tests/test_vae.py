import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2
from support.golden_vae import GoldenVae, load_vae

from microdit_jax.encoders.vae import (
    Attention,
    AutoencoderKL,
    GroupNorm,
    VaeConfig,
    sample_latents,
)
from microdit_jax.errors import UserError


@pytest.fixture(params=["vae_small", "vae_small_16ch"])
def golden(request) -> GoldenVae:
    return load_vae(request.param)


@pytest.fixture
def small() -> GoldenVae:
    return load_vae("vae_small")


def apply(golden, x, method: str, config=None):
    model = AutoencoderKL(config or golden.config)
    return jax.jit(lambda params, x: model.apply({"params": params}, x, method=method))(
        golden.params, jnp.asarray(x)
    )


def test_encoder_and_decoder_against_diffusers(golden):
    mean, logvar = apply(golden, golden["image"], "encode_moments")
    assert relative_l2(mean, golden["mean"]) < 2e-5
    assert relative_l2(logvar, golden["logvar"]) < 2e-5
    assert relative_l2(apply(golden, golden["latent"], "decode"), golden["decoded"]) < 2e-5


def test_bfloat16_stays_close_and_comes_back_as_float32(small):
    config = dataclasses.replace(small.config, dtype="bfloat16")
    images = apply(small, small["latent"], "decode", config)
    mean, logvar = apply(small, small["image"], "encode_moments", config)
    for found, name in ((images, "decoded"), (mean, "mean"), (logvar, "logvar")):
        assert found.dtype == jnp.float32
        assert 1e-4 < relative_l2(found, small[name]) < 3e-2


def test_log_variance_is_clamped(small):
    quant = small.params["quant_conv"]
    bias = quant["bias"].at[4:].set(jnp.array([100.0, -100.0, 100.0, -100.0]))
    changed = {**small.params, "quant_conv": {**quant, "bias": bias}}
    _, logvar = AutoencoderKL(small.config).apply(
        {"params": changed}, jnp.asarray(small["image"][:1]), method="encode_moments"
    )
    np.testing.assert_array_equal(logvar[0, 0, 0], [20.0, -30.0, 20.0, -30.0])


def test_group_norm_has_no_mean_and_unit_variance_in_each_group():
    x = 1000 + jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    params = {"scale": jnp.full(8, 2.0), "bias": jnp.full(8, 0.5)}
    y = GroupNorm(4).apply({"params": params}, x)
    assert GroupNorm(4).apply({"params": params}, x.astype(jnp.bfloat16)).dtype == jnp.float32
    groups = np.asarray(y).reshape(2, 15, 4, 2)
    np.testing.assert_allclose(groups.mean(axis=(1, 3)), 0.5, atol=1e-3)
    np.testing.assert_allclose(groups.std(axis=(1, 3)), 2.0, rtol=1e-3)


def test_attention_is_one_head_over_all_pixels():
    config = VaeConfig((8,), 4, 1.0, norm_num_groups=4)
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    variables = jax.jit(Attention(config).init)(jax.random.key(1), x)
    found = jax.jit(Attention(config).apply)(variables, x)
    p = jax.tree.map(np.asarray, variables["params"])
    y = np.asarray(GroupNorm(4).apply({"params": p["group_norm"]}, x)).reshape(2, 15, 8)
    q, k, v = (y @ p[name]["kernel"] + p[name]["bias"] for name in ("to_q", "to_k", "to_v"))
    weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(8))
    mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ v
    expected = mixed @ p["to_out_0"]["kernel"] + p["to_out_0"]["bias"]
    assert relative_l2(found - x, expected.reshape(2, 3, 5, 8)) < 2e-5


def test_sampling_uses_the_given_noise():
    mean, logvar = jnp.full((1, 1, 1, 2), 3.0), jnp.log(jnp.full((1, 1, 1, 2), 4.0))
    noise = jnp.array([1.0, -0.5]).reshape(1, 1, 1, 2)
    np.testing.assert_allclose(sample_latents(mean, logvar, noise).ravel(), [5.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("sides", [(16, 40), (8, 8)])
def test_rectangles(small, sides):
    config = small.config
    images = jax.ShapeDtypeStruct((3, *sides, 3), np.float32)
    model = AutoencoderKL(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    mean, _ = jax.eval_shape(
        lambda v, x: model.apply(v, x, method="encode_moments"), variables, images
    )
    assert mean.shape == (3, sides[0] // 4, sides[1] // 4, 4)
    back = jax.eval_shape(lambda v, x: model.apply(v, x, method="decode"), variables, mean)
    assert back.shape == images.shape


def test_slices_give_what_one_call_gives(small):
    latents = np.concatenate([small["latent"], -small["latent"], small["latent"][:1]])
    whole = small.codec(slice_size=5).decode(latents)
    assert whole.dtype == np.float32 and np.abs(whole).max() <= 1
    np.testing.assert_allclose(small.codec(slice_size=2).decode(latents), whole, atol=1e-5)
    np.testing.assert_allclose(
        whole[:2], np.clip(small["decoded"], -1, 1), atol=2e-5 * np.abs(small["decoded"]).max()
    )


def test_the_codec_encodes_the_mode_or_a_sample(small):
    codec, images = small.codec(slice_size=2), small["image"]
    assert (codec.channels, codec.scaling_factor) == (4, 0.13025)
    assert relative_l2(codec.encode(images), small["mean"]) < 2e-5
    noise = np.random.default_rng(0).standard_normal(small["mean"].shape, np.float32)
    expected = small["mean"] + np.exp(small["logvar"] / 2) * noise
    assert relative_l2(codec.encode(images, noise=noise), expected) < 2e-5


def test_the_codec_on_another_device(small):
    codec, device = small.codec(), jax.devices()[2]
    copied = codec.with_sharding(jax.sharding.SingleDeviceSharding(device))
    assert jax.tree.leaves(copied.params)[0].devices() == {device}
    assert codec.on_device and codec.pixels_per_latent == 4
    np.testing.assert_allclose(
        copied.decode(small["latent"]), codec.decode(small["latent"]), atol=1e-5
    )


def test_bad_inputs_to_the_codec(small):
    codec = small.codec()
    with pytest.raises(
        UserError, match="latents of 4 channels for this VAE, found 16; give the VAE"
    ):
        codec.decode(np.zeros((1, 4, 4, 16), np.float32))
    with pytest.raises(UserError, match="multiples of 4 pixels, found 30x32x3"):
        codec.encode(np.zeros((1, 30, 32, 3), np.float32))
    with pytest.raises(UserError, match="of 3 channels .* found 32x32x1"):
        codec.encode(np.zeros((1, 32, 32, 1), np.float32))
    with pytest.raises(UserError, match="at least one image"):
        codec.decode(np.zeros((0, 8, 8, 4), np.float32))
    with pytest.raises(UserError, match="finite images from the VAE, found NaN or infinity"):
        codec.decode(np.where(np.arange(4) == 2, np.nan, small["latent"]).astype(np.float32))
    with pytest.raises(UserError, match="slice_size must be at least 1, found 0"):
        small.codec(slice_size=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": "float16"}, "float32 or bfloat16, found 'float16'; its activations overflow"),
        ({"norm_num_groups": 3}, "multiples of norm_num_groups 3"),
        ({"block_out_channels": ()}, "multiples of norm_num_groups"),
        ({"scaling_factor": 0.0}, "positive number, found 0.0"),
        ({"scaling_factor": float("nan")}, "positive number, found nan"),
    ],
)
def test_configs_that_cannot_be(small, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(small.config, **changes)
