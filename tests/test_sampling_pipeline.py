"""The pipeline: the same image whatever the batch and the devices; what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2
from support.tiny_pipeline import OPTIONS, PROMPTS, pipeline

from microdit_jax import diffusion, sharding
from microdit_jax.diffusion import EdmConfig
from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.encoders.vae_codec import VaeCodec
from microdit_jax.errors import UserError
from microdit_jax.machine import memory
from microdit_jax.noise import initial_noise
from microdit_jax.sampling import guidance, solvers


@functools.cache
def expected() -> np.ndarray:
    return pipeline().generate(PROMPTS, **OPTIONS)


def test_images():
    images = expected()
    assert images.shape == (8, 16, 16, 3) and images.dtype == np.float32
    assert 0 <= images.min() and images.max() <= 1
    assert np.abs(images[0] - images[3]).max() > 0.01  # one prompt, two noises
    other = pipeline().generate(PROMPTS, **OPTIONS | {"seed": 4})
    assert np.abs(other - images).max() > 0.01


@pytest.mark.parametrize("mesh", [None, (2, 1, 1), (8, 1, 1), (2, 2, 2), (1, 8, 1)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_same_images_on_any_devices_in_any_batch(mesh, batch_size):
    if mesh is not None:
        mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)])
    images = pipeline(mesh).generate(PROMPTS, batch_size=batch_size, **OPTIONS)
    np.testing.assert_allclose(images, expected(), atol=1e-4)


# No value is a default's: a setting that gets lost on the way must change the images.
OTHER_EDM = EdmConfig(sigma_data=0.5, sigma_min=0.01, sigma_max=20.0, rho=5.0)


@pytest.mark.parametrize("edm", [EdmConfig(), OTHER_EDM], ids=["default", "other"])
def test_equals_the_sampler_in_one_program(edm):
    pipe = dataclasses.replace(pipeline(), edm=edm)
    params, model = pipe.params, pipe.model
    noise = initial_noise("jax", 3, 8, 8, 8, 4)
    y = pipe.encode(PROMPTS)
    np.testing.assert_array_equal(y[0], y[3])
    both = guidance.interleave(jnp.asarray(y), jnp.zeros_like(y))
    network = guidance.guided(
        lambda x, t: model.apply({"params": params}, x, t, both)[0], jnp.float32(2.0)
    )
    denoise = diffusion.denoiser(network, edm.sigma_data)
    evaluations = solvers.heun_evaluations(2, edm)
    sample = jax.jit(lambda x: solvers.sample(denoise, x, evaluations, edm))(noise)
    latents = pipe.generate(PROMPTS, return_only_latents=True, **OPTIONS)
    assert relative_l2(latents, sample) < 1e-5


def test_the_codec_is_given_raw_latents_and_its_images_are_clipped():
    class Codec(VaeCodec):
        def decode(self, latents):
            seen.append(latents)
            return np.linspace(-3, 3, 12, dtype=np.float32).reshape(1, 2, 2, 3)

    seen, small = [], pipeline().codec
    assert small.scaling_factor not in (0, 1)
    pipe = dataclasses.replace(pipeline(), codec=Codec("vae", small.config, small.params))
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    images = pipe.decode(latents)
    np.testing.assert_allclose(seen[0] * small.scaling_factor, latents, rtol=1e-6)
    expected = np.clip((np.linspace(-3, 3, 12) + 1) / 2, 0, 1).reshape(1, 2, 2, 3)
    np.testing.assert_allclose(images, expected, atol=1e-6)


def test_seed_0_is_a_seed_and_none_is_another_each_time():
    pipe, options = pipeline(), OPTIONS | {"return_only_latents": True}
    first, again = (pipe.generate(["a"], **options | {"seed": 0}) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    del options["seed"]
    noise = initial_noise("jax", 0, 1, 8, 8, 4)
    np.testing.assert_array_equal(first, pipe.generate(["a"], noise=noise, **options))
    one, other = (pipe.generate(["a"], seed=None, **options) for _ in range(2))
    assert np.abs(one - other).max() > 0.01


def test_the_attention_mask_goes_to_the_encoder():
    class Encoder(TokenTable):
        def encode(self, ids, attention_mask=None):
            seen.append(attention_mask)
            return super().encode(ids)

    seen, mask = [], np.array([[1, 1, 1, 0, 0, 0, 0]])
    pipe = dataclasses.replace(pipeline(), text_encoder=Encoder(24, 7, 0))
    ids = pipe.text_encoder.tokenizer(["dog"])
    pipe.encode(tokenized_prompts=ids, attention_mask=mask)
    assert len(seen) == 1 and seen[0] is mask


def test_any_number_of_steps_and_any_guidance_run_one_program():
    pipe = pipeline()
    for steps, scale in ((1, 2.0), (3, 7.0)):
        pipe.generate(["a"], num_inference_steps=steps, guidance_scale=scale, seed=0)
    assert len(pipe._programs) == 1
    (programs,) = pipe._programs.values()
    pipe.generate(["b"], num_inference_steps=1, guidance_scale=1.0, seed=0)
    assert len(pipe._programs) == 2 and pipe._programs[1, 7, "guided"] is programs


def test_other_weights_run_the_same_program():
    pipe = pipeline()
    pipe.generate(["a"], **OPTIONS)
    before = dict(pipe._programs)
    other = dataclasses.replace(pipe, params=jax.tree.map(lambda p: 2 * p, pipe.params))
    assert np.abs(other.generate(["a"], **OPTIONS) - pipe.generate(["a"], **OPTIONS)).max() > 0.01
    assert other._programs == before and len(before) == 1


def test_given_noise_and_token_ids():
    pipe = pipeline()
    ids = pipe.text_encoder.tokenizer(PROMPTS)
    options = {k: v for k, v in OPTIONS.items() if k != "seed"}
    noise = initial_noise("jax", 3, 8, 8, 8, 4)
    images = pipe.generate(tokenized_prompts=ids, noise=noise, **options)
    np.testing.assert_array_equal(images, expected())


def test_a_mask_reaches_the_text_encoder():
    seen = []

    class Watched(TokenTable):
        def encode(self, ids, attention_mask=None):
            seen.append(attention_mask)
            return super().encode(ids)

    pipe = dataclasses.replace(pipeline(), text_encoder=Watched(24, 7, 0))
    ids = pipe.text_encoder.tokenizer(PROMPTS)
    pipe.encode(tokenized_prompts=ids, attention_mask=ids != 0)
    np.testing.assert_array_equal(seen[0], ids != 0)


def test_progress_is_one_tick_an_evaluation():
    ticks = []

    def watched(work):
        for item in work:
            ticks.append(item)
            yield item

    images = pipeline().generate(PROMPTS, batch_size=4, progress=watched, **OPTIONS)
    assert len(ticks) == 2 * 3
    np.testing.assert_allclose(images, expected(), atol=1e-4)


def test_previews_are_of_their_own_images():
    """The last step, to sigma 0, ends at what the network made of the noise then."""
    pipe, seen = pipeline(), []
    options = OPTIONS | {"num_inference_steps": 3, "batch_size": 2}
    expected = pipe.generate(PROMPTS[:3], return_only_latents=True, **options)
    batches = list(pipe.sample(PROMPTS[:3], preview=lambda *args: seen.append(args), **options))
    assert [(start, step, len(x)) for start, step, x in seen] == [
        (start, step, count) for start, count in ((0, 2), (2, 1)) for step in range(3)
    ]
    for start, _, found in (seen[2], seen[5]):
        np.testing.assert_allclose(found, expected[start : start + 2], atol=1e-5)
    images = np.concatenate([batch.images for batch in batches])
    np.testing.assert_array_equal(images, pipe.decode(expected))


@pytest.mark.parametrize("noise", ["jax", "torch_cpu"])
def test_any_part_of_a_set_in_any_batches(noise):
    pipe = pipeline()
    whole = pipe.generate(PROMPTS, noise=noise, **OPTIONS)
    indices = [6, 2, 3, 0, 5]
    prompts = [PROMPTS[i] for i in indices]
    batches = list(
        pipe.sample(prompts, indices=indices, total=8, noise=noise, batch_size=2, **OPTIONS)
    )
    assert [batch.indices for batch in batches] == [[6, 2], [3, 0], [5]]
    found = np.concatenate([batch.images for batch in batches])
    np.testing.assert_allclose(found, whole[indices], atol=1e-4)
    assert set(batches[0].seconds) == {"text", "compiling", "sampling", "decoding"}


def test_noise_of_torch_is_that_of_the_whole_set(monkeypatch):
    """Sets of more values than a GPU has threads depend on it."""

    def recorded(kind, seed, num_images, *shape):
        seen.append(num_images)
        return initial_noise(kind, seed, num_images, *shape)

    seen = []
    monkeypatch.setattr("microdit_jax.sampling.pipeline.initial_noise", recorded)
    options = OPTIONS | {"noise": "torch_cpu", "num_inference_steps": 1}
    next(pipeline().sample(["a"], indices=[2], total=8, **options))
    assert seen == [8]


def test_a_batch_comes_before_the_next_is_begun():
    """So that it can be saved; the bar still ends at its end."""
    seen = []

    def progress(work):
        for item in work:
            seen.append("evaluation")
            yield item
        seen.append("end")

    options = OPTIONS | {"num_inference_steps": 1, "batch_size": 2}
    for _ in pipeline().sample(PROMPTS[:3], progress=progress, **options):
        seen.append("batch")
    assert seen == ["evaluation", "batch", "evaluation", "batch", "end"]


@pytest.mark.parametrize(
    "indices, total, message",
    [
        ([99], 24, "expected 1 indices from 0 to 23, one for each prompt, found 1 from 99 to 99"),
        ([-1], None, "found 1 from -1 to -1"),
        ([0, 1], None, "expected 1 indices"),
    ],
)
def test_indices_that_are_not_of_the_set(indices, total, message):
    with pytest.raises(UserError, match=message):
        next(pipeline().sample(["a"], indices=indices, total=total, **OPTIONS))


def test_warming_up_compiles_what_is_needed_later():
    pipe = pipeline()
    pipe.warm_up(8, batch_size=8)
    before = dict(pipe._programs)
    pipe.generate(PROMPTS, **OPTIONS)
    assert pipe._programs == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "either prompt or tokenized_prompts"),
        ({"prompt": []}, "found none or an empty one"),
        ({"prompt": ["a", " "]}, "found none or an empty one"),
        ({"prompt": "a", "attention_mask": np.ones((1, 7))}, "belongs to tokenized_prompts"),
        ({"prompt": "a", "noise": "torch"}, "expected one of jax, torch_cpu"),
        ({"prompt": "a", "noise": np.zeros((1, 4, 4, 4)), "seed": None}, r"expected noise \(1, 8"),
        ({"prompt": "a", "num_inference_steps": 0}, "must be at least 1 for .*found 0"),
        ({"prompt": "a", "guidance_scale": np.nan}, "must be a finite number, found nan"),
        ({"prompt": "a", "guidance_scale": -2.0}, "must not be negative, found -2"),
        ({"prompt": "a", "solver": "ddim"}, "solver must be one of"),
        (
            {
                "prompt": None,
                "tokenized_prompts": np.ones((1, 5), np.int32),
                "negative_prompt": "a",
            },
            "as many tokens as the negative prompt, 7, found 5",
        ),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        pipeline().generate(**OPTIONS | arguments)


def test_latents_that_are_not_finite_are_refused():
    pipe = pipeline()
    broken = jax.tree.map(lambda p: p * np.float32(np.nan), pipe.params)
    with pytest.raises(UserError, match="expected finite latents"):
        dataclasses.replace(pipe, params=broken).generate(["dog"], **OPTIONS)


def test_a_batch_that_does_not_fit_is_refused_with_one_that_would(monkeypatch):
    free = 2_000_000
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    with pytest.raises(UserError, match=r"batch_size=64 needs .*; batch_size=(\d+) would fit") as e:
        pipeline().generate(["a"] * 64, batch_size=64, **OPTIONS)
    fitting = int(str(e.value).split("; batch_size=")[1].split()[0])
    assert 1 <= fitting < 64
    free = 1000
    with pytest.raises(UserError, match="not even one image"):
        pipeline().generate(["a"] * 64, batch_size=64, **OPTIONS)


def test_running_out_of_memory_is_one_line():
    with pytest.raises(UserError, match="use a smaller one; more in docs/troubleshooting.md"):
        with memory.out_of_memory("a smaller one"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
    with pytest.raises(jax.errors.JaxRuntimeError):
        with memory.out_of_memory("a smaller one"):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
