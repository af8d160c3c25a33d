"""Few-step students: what the sampler makes of them, and autoguidance by a weaker network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2
from support.tiny_pipeline import pipeline

from microdit_jax.errors import UserError
from microdit_jax.noise import added_noise, initial_noise
from microdit_jax.sampling.student import Student

STUDENT = Student(teacher="runs/a", guidance_scale=3.0, guidance_interval=(0.05, 1.5), weights="0a")


def student():
    return dataclasses.replace(pipeline(), student=STUDENT)


def denoised(pipe, x, sigma, y, params=None):
    total = sigma**2 + 0.81
    F = pipe.model.apply(
        {"params": pipe.params if params is None else params},
        jnp.asarray(x / np.sqrt(total), jnp.float32),
        jnp.full(len(x), np.log(sigma) / 4, jnp.float32),
        jnp.asarray(y),
    )[0]
    return 0.81 / total * x + sigma * 0.9 / np.sqrt(total) * np.asarray(F)


def test_a_student_denoises_and_takes_noise_anew():
    pipe = student()
    found = pipe.generate("dog", seed=4, num_inference_steps=3, return_only_latents=True)
    y, levels = pipe.encode("dog"), pipe.settings({"num_inference_steps": 3}).levels(pipe.edm)
    assert levels[0] == 80 and levels[-1] == 0 and len(levels) == 4
    x = initial_noise("jax", 4, 1, 8, 8, 4) * 80
    for number, level in enumerate(levels[:-1]):
        if number:
            x = x + np.float32(level) * added_noise(4, 0, number, (8, 8, 4))
        x = denoised(pipe, x, level, y)
    assert relative_l2(found, x) < 1e-5
    assert [form for _, _, form in pipe._programs] == ["conditional"]


def test_a_student_decides_its_settings():
    sampler = student().settings({})
    assert (sampler.solver, sampler.steps, sampler.guidance_scale) == ("student", 4, 3.0)
    assert student().settings({"guidance_scale": 3.0, "schedule": "log"}).schedule == "log"
    assert pipeline().settings({}).solver == "heun"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "heun"}, "takes solver=student alone, found solver=heun; .* runs/a"),
        ({"guidance_scale": 5.0}, "guidance_scale of 3 built in, found 5 asked for"),
        ({"guidance": "interval"}, "guidance is built in: .* found guidance=interval"),
        ({"guidance_rescale": 0.5}, "guidance is built in"),
        ({"negative_prompt": "dog"}, "found a student; leave it out"),
        ({"churn": (1.0, 0.0, 1.0, 1.0)}, "churn is for solver=heun, found solver=student"),
    ],
)
def test_what_a_student_does_not_take(options, message):
    with pytest.raises(UserError, match=message):
        student().generate("dog", **options)


def test_other_networks_do_not_take_the_students_solver():
    with pytest.raises(UserError, match="solver=student is for few-step students"):
        pipeline().generate("dog", solver="student")


def test_a_record_is_read_again():
    assert Student.from_dict(None, "x") is None
    assert Student.from_dict(dataclasses.asdict(STUDENT), "x") == STUDENT
    for wrong in ([], {}, {"teacher": "a"}, dataclasses.asdict(STUDENT) | {"guidance_interval": 3}):
        with pytest.raises(UserError, match="expected a student's teacher, .* in x/config.json"):
            Student.from_dict(wrong, "x/config.json")


# ------------------------------------------------------------------ autoguidance
def test_autoguidance_leads_away_from_the_weaker_network():
    """One Euler step from each noise level, by hand: D_weak + g (D - D_weak), same caption."""
    pipe = pipeline()
    weaker = jax.tree.map(lambda leaf: 0.8 * leaf, pipe.params)
    pipe = dataclasses.replace(pipe, weaker=weaker)
    options = {"guidance": "auto", "guidance_scale": 2.5, "solver": "euler"}
    options |= {"num_inference_steps": 2}
    found = pipe.generate("dog", seed=4, return_only_latents=True, **options)
    sampler = pipe.settings(options)
    assert sampler.plan(pipe.edm)[0].form.passes == 2
    y, levels = pipe.encode("dog"), sampler.levels(pipe.edm)
    x = initial_noise("jax", 4, 1, 8, 8, 4) * 80
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        weak, strong = (denoised(pipe, x, now, y, params) for params in (weaker, pipe.params))
        D = weak + 2.5 * (strong - weak)
        x = x + (following - now) * (x - D) / now
    assert relative_l2(found, x) < 1e-5
    same = dataclasses.replace(pipe, weaker=pipe.params).generate("dog", seed=4, **options)
    plain = pipe.generate("dog", seed=4, **options | {"guidance": "cfg", "guidance_scale": 1.0})
    np.testing.assert_allclose(same, plain, atol=1e-4)


def test_autoguidance_needs_a_weaker_network():
    with pytest.raises(UserError, match="guidance=auto needs a weaker network, found none"):
        pipeline().generate("dog", guidance="auto")
    with pytest.raises(UserError, match="takes a guidance_scale of 1 or more"):
        pipeline().generate("dog", guidance="auto", guidance_scale=0.5)
