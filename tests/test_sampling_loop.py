"""The sampler's loop: which programs run for which solver and guidance, and on what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2
from support.tiny_pipeline import OPTIONS, pipeline

from microdit_jax import diffusion
from microdit_jax.noise import initial_noise
from microdit_jax.sampling import guidance, schedules, solvers


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 0.5, 2.0])
def test_guidance_scales(guidance_scale):
    """0 and 1 take one of the two captions alone; anything else is between or beyond them."""
    pipe = pipeline()
    options = OPTIONS | {"guidance_scale": guidance_scale, "return_only_latents": True}
    found = pipe.generate(["dog"], **options)
    form = "conditional" if guidance_scale in (0, 1) else "guided"
    assert list(pipe._programs) == [(1, 7, form)]
    y, noise = jnp.asarray(pipe.encode(["dog"])), initial_noise("jax", 3, 1, 8, 8, 4)

    def network(x, t):
        F = [pipe.model.apply({"params": pipe.params}, x, t, c)[0] for c in (y, 0 * y)]
        return guidance_scale * F[0] + (1 - guidance_scale) * F[1]

    denoise, evaluations = diffusion.denoiser(network, 0.9), solvers.heun_evaluations(2, pipe.edm)
    sample = jax.jit(lambda x: solvers.sample(denoise, x, evaluations, pipe.edm))(noise)
    assert relative_l2(found, sample) < 1e-5


def test_solvers_schedules_and_strengths_run_one_program():
    pipe = pipeline()
    images = [
        pipe.generate(["a"], num_inference_steps=4, guidance_scale=2.0, seed=0, **options)
        for options in (
            *({"solver": name} for name in solvers.SOLVERS if name != solvers.STUDENT),
            {"solver": "ab3", "schedule": "edm"},
            {"negative_prompt": "dog"},
        )
    ]
    assert list(pipe._programs) == [(1, 7, "guided")]
    for i, image in enumerate(images):
        assert all(np.abs(image - other).max() > 1e-5 for other in images[:i])


def heun_by_hand(pipe, y, without, scales, noise):
    """Algorithm 1 in float32, bit for bit, with a guidance scale for each level."""

    @jax.jit
    def denoise(x, sigma, scale):
        def network(x, t):
            both = guidance.interleave(jnp.asarray(y), jnp.asarray(without))
            return pipe.model.apply({"params": pipe.params}, x, t, both)[0]

        F = guidance.guided(network, scale)
        return diffusion.denoiser(F, pipe.edm.sigma_data)(x, jnp.full(len(x), sigma))

    levels = np.append(schedules.edm_levels(len(scales), pipe.edm)[:-1], 0.0).astype(np.float32)
    x = noise * np.float32(pipe.edm.sigma_max)
    for i, (now, following) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        slope = (x - denoise(x, now, scales[i])) / now
        ahead = x + (following - now) * slope
        if following > 0:
            slope = 0.5 * (slope + (ahead - denoise(ahead, following, scales[i + 1])) / following)
        x = x + (following - now) * slope
    return np.asarray(x)


def test_a_negative_prompt_takes_the_zero_captions_place():
    pipe, noise = pipeline(), initial_noise("jax", 3, 2, 8, 8, 4)
    y, without = pipe.encode(["dog", "cat"]), pipe.encode(["sun", "sun"])
    options = {"guidance_scale": 3.0, "num_inference_steps": 3}
    found = pipe.denoise(y, noise, negative_prompt="sun", **options)
    assert relative_l2(found, heun_by_hand(pipe, y, without, [3.0] * 3, noise)) < 1e-5
    plain = pipe.denoise(y, noise, **options)
    assert relative_l2(plain, heun_by_hand(pipe, y, 0 * without, [3.0] * 3, noise)) < 1e-5
    assert relative_l2(plain, found) > 0.01


def test_an_interval_runs_the_single_batch_outside_of_it():
    pipe, noise = pipeline(), initial_noise("jax", 3, 2, 8, 8, 4)
    y, options = pipe.encode(["dog", "cat"]), {"guidance_scale": 3.0, "num_inference_steps": 4}
    interval = {"guidance": "interval", "guidance_interval": (0.01, 10.0)}
    found = pipe.denoise(y, noise, **options, **interval)
    assert sorted(pipe._programs) == [(2, 7, "conditional"), (2, 7, "guided")]
    # Levels 80, 9.7, 0.47 and 0.002
    expected = heun_by_hand(pipe, y, 0 * y, [1.0, 3.0, 3.0, 1.0], noise)
    assert relative_l2(found, expected) < 1e-5
    pipe.warm_up(2, batch_size=2, **options, **interval)
    assert len(pipe._programs) == 2


def test_apg_carries_its_average_from_one_evaluation_to_the_next():
    pipe, noise = pipeline(), initial_noise("jax", 3, 1, 8, 8, 4)
    y, options = pipe.encode(["dog"]), {"guidance_scale": 3.0, "num_inference_steps": 4}
    plain = pipe.denoise(y, noise, **options)
    as_cfg = pipe.denoise(y, noise, guidance="apg", apg=(1.0, 0.0, 0.0), **options)
    assert relative_l2(as_cfg, plain) < 1e-5
    with_momentum = pipe.denoise(y, noise, guidance="apg", apg=(1.0, -0.5, 0.0), **options)
    assert relative_l2(with_momentum, plain) > 1e-3
    assert relative_l2(pipe.denoise(y, noise, guidance_rescale=0.7, **options), plain) > 1e-3
