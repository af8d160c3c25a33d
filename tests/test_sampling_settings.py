"""Settings of the sampler: what they amount to, and what does not go together."""

import numpy as np
import pytest

from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.sampling.guidance import Form
from microdit_jax.sampling.schedules import dense_levels
from microdit_jax.sampling.settings import Sampler, network_passes

EDM = EdmConfig()


@pytest.mark.parametrize(
    "options, evaluations, passes",
    [
        ({}, 59, 118),
        ({"guidance_scale": 1.0}, 59, 59),
        ({"guidance_scale": 0.0}, 59, 59),
        ({"guidance_scale": 0.5, "num_inference_steps": 2}, 3, 6),
        ({"solver": "ab3"}, 16, 32),
        ({"solver": "sab2", "num_inference_steps": 12}, 12, 24),
        ({"solver": "euler", "guidance": "cfgpp", "guidance_scale": 0.6}, 50, 100),
        ({"solver": "unipc", "guidance": "apg"}, 20, 40),
        # Five of 16 levels lie in the interval
        (
            {
                "solver": "ab3",
                "schedule": "log",
                "guidance": "interval",
                "guidance_interval": (0.15, 3.0),
            },
            16,
            21,
        ),
    ],
)
def test_evaluations_and_passes(options, evaluations, passes):
    plan = Sampler(**options).plan(EDM)
    assert (len(plan), network_passes(plan)) == (evaluations, passes)
    assert {evaluation.form for evaluation in plan} <= Sampler(**options).forms()


def test_the_default_is_the_reference():
    sampler = Sampler()
    assert (sampler.solver, sampler.schedule, sampler.steps) == ("heun", "edm", 30)
    assert (sampler.guidance, sampler.guidance_scale) == ("cfg", 5.0)


def test_an_interval_guides_between_its_levels_alone():
    sampler = Sampler(
        solver="ab3", guidance="interval", guidance_interval=(0.1, 2.0), guidance_scale=3.0
    )
    for evaluation, sigma in zip(sampler.plan(EDM), dense_levels(16, EDM)[:-1], strict=True):
        inside = 0.1 < sigma <= 2
        assert evaluation.form == (Form.GUIDED if inside else Form.CONDITIONAL)
        assert evaluation.strength.scale == (3 if inside else 1)


def test_steps_are_counted_for_previews():
    steps = [evaluation.step for evaluation in Sampler(num_inference_steps=3).plan(EDM)]
    assert steps == [0, None, 1, None, 2]
    steps = [evaluation.step for evaluation in Sampler(solver="unipc").plan(EDM)]
    assert steps == list(range(20))


def test_cfgpp_is_its_algorithm():
    """Chung et al. 2024, Algorithm 2: denoise with lambda, renoise with the unconditional."""
    sampler = Sampler(
        solver="euler", guidance="cfgpp", guidance_scale=0.6, num_inference_steps=7, schedule="edm"
    )
    x, D_cond, D_uncond = np.random.default_rng(0).normal(size=(3, 5))
    levels = [float(evaluation.at.sigma) for evaluation in sampler.plan(EDM)] + [0.0]
    for evaluation, now, following in zip(sampler.plan(EDM), levels, levels[1:], strict=False):
        expected = D_uncond + 0.6 * (D_cond - D_uncond) + following * (x - D_uncond) / now
        D = D_uncond + evaluation.strength.scale * (D_cond - D_uncond)
        np.testing.assert_allclose(x + (following - now) * (x - D) / now, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "ddim"}, "solver must be one of heun, .*, found 'ddim'"),
        ({"schedule": "karras"}, "schedule must be one of edm, .*, found 'karras'"),
        ({"guidance": "magic"}, "guidance must be one of cfg, .*, found 'magic'"),
        ({"num_inference_steps": 0}, "must be at least 1 for the solver heun, found 0"),
        ({"solver": "ab3", "num_inference_steps": 2}, "at least 3 for the solver ab3, found 2"),
        ({"guidance_scale": -5.0}, "guidance_scale must not be negative, found -5; 0 is"),
        ({"guidance_scale": float("nan")}, "must be a finite number, found nan"),
        ({"guidance": "cfgpp"}, "takes solver=euler and a guidance_scale above 0 and up to 1"),
        ({"guidance": "cfgpp", "solver": "euler"}, "found solver=euler and 5"),
        ({"guidance": "interval", "guidance_interval": (2.0, 2.0)}, "found 2 and 2"),
        ({"guidance": "interval", "guidance_interval": (3.0, 2.0)}, "low < high, found 3 and 2"),
        ({"guidance_interval": (1.0, 2.0)}, "is for guidance=interval, found guidance=cfg"),
        ({"apg": (0.0, 0.0, 0.0)}, "apg is for guidance=apg, found guidance=cfg"),
        ({"guidance": "apg", "apg": (0.0, 0.0, -1.0)}, "three finite numbers, .* found 0, 0, -1"),
        ({"guidance_rescale": 1.5}, r"must be in \[0, 1\], found 1.5"),
        ({"negative_prompt": "blurry", "guidance_scale": 1.0}, "needs guidance, found none"),
        ({"negative_prompt": "blurry", "guidance_scale": 0.0}, "other than 0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampler(**options)


@pytest.mark.parametrize("interval", [(90.0, 100.0), (0.0, 0.001)])
def test_an_interval_outside_the_schedule(interval):
    sampler = Sampler(guidance="interval", guidance_interval=interval)
    with pytest.raises(UserError, match="must hold some of the schedule's noise levels, 80 to"):
        sampler.plan(EDM)
