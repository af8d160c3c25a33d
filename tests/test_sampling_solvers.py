"""Solvers: each against its textbook form in float64, its order, and diffusers' schedulers.

tests/golden/diffusers_schedulers.npz: diffusers 0.42.1, DPMSolverMultistepScheduler (dpmsolver++,
order 2, midpoint) and UniPCMultistepScheduler (order 2, bh2), final sigma 0 and lower order there,
prediction_type "sample", in float64 on `edm_levels` of 6 and 20 steps, for the denoiser of
support/mixture.py. Their x, after each step and divided by their alpha, is in units of ours.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, relative_l2
from support import mixture

from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.sampling import coefficients, schedules, solvers

EDM = EdmConfig()
NOISE = np.random.default_rng(0).normal(size=(2, 4, 4, 1))


def on_host(x, sigma):
    """The mixture's denoiser for JAX's arrays, one evaluation at a time."""
    return jnp.asarray(mixture.denoise(np.asarray(x, np.float64), float(sigma[0])), jnp.float32)


def path(rows, noise=NOISE) -> list[np.ndarray]:
    """x after each evaluation, by `evaluate` in float32."""
    state = solvers.start(jnp.asarray(noise, jnp.float32), EDM)
    found = []
    for row in rows:
        state = solvers.evaluate(on_host, state, row)
        found.append(np.asarray(state.x))
    return found


def exactly(rows, noise) -> np.ndarray:
    """x at the end in float64, as far as the coefficients are."""
    x = start = noise
    last = before = 0 * x
    for row in rows:
        D = mixture.denoise(x, float(row.sigma))
        outputs = D if row.keeps_denoised else (x - D) / float(row.sigma), last, before

        def updated(x, update, outputs=outputs):
            combined = sum(w * output for w, output in zip(update.weights, outputs, strict=True))
            return x + update.step * (combined - update.pull * x)

        start = x if row.restarts else updated(start, row.corrector)
        x, last, before = updated(start, row.predictor), outputs[0], outputs[1]
    return x


# ------------------------------------------------------------------------------ by hand, float64
def slope(x, sigma):
    return (x - mixture.denoise(x, sigma)) / sigma


def euler(levels, x):
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        x = x + (following - now) * slope(x, now)
    return x


def heun(levels, x):
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        first = slope(x, now)
        ahead = x + (following - now) * first
        if following > 0:
            first = (first + slope(ahead, following)) / 2
        x = x + (following - now) * first
    return x


def integral(known, now, following):
    """Integral of the polynomial through known slopes, by its coefficients in sigma."""
    scale = known[0][0]
    nodes = np.array([sigma for sigma, _ in known]) / scale
    slopes = np.stack([s.ravel() for _, s in known])
    coefficients = np.linalg.solve(np.vander(nodes, increasing=True), slopes)  # (order, pixels)
    powers = np.arange(1, len(known) + 1)[:, None]
    ends = (following / scale) ** powers - (now / scale) ** powers
    return scale * (coefficients * ends / powers).sum(axis=0).reshape(known[0][1].shape)


def adams_bashforth(levels, x, order):
    known = []
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        known = [*known, (now, slope(x, now))][-order:]
        x = x + integral(known, now, following)
    return x


def stabilised(levels, x):
    """The second order's step, less what the third would add to it."""
    known = []
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        known = [*known, (now, slope(x, now))][-3:]
        second, third = (integral(known[-order:], now, following) for order in (2, 3))
        x = x + 2 * second - third
    return x


def dpmpp_2m(levels, x):
    """As the paper has it, in lambda, t and D (Lu et al. 2022, Algorithm 2)."""
    lam = -np.log(np.maximum(levels, 1e-300))
    earlier = None
    for i in range(len(levels) - 1):
        D = mixture.denoise(x, levels[i])
        used = D
        if earlier is not None and levels[i + 1] > 0:
            r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            used = (1 + 1 / (2 * r)) * D - earlier / (2 * r)
        h = lam[i + 1] - lam[i]
        x = levels[i + 1] / levels[i] * x - np.expm1(-h) * used
        earlier = D
    return x


def unipc(levels, x):
    """UniPC-2, B2: predictor x + (..)(D0 + 1/2 D1/r), corrector by a 2 x 2 system."""
    steps, known, start = len(levels) - 1, [], x
    for i in range(steps):
        D = mixture.denoise(x, levels[i])
        if i:
            s, t = levels[i - 1], levels[i]
            h = np.log(s / t)
            D0 = known[-1]
            if len(known) > 1:
                r = np.log(levels[i - 2] / s) / -h
                # phi_2 and phi_3 of -h by their series: b_k = k! phi_{k+1}(-h) h / (1 - e^-h)
                phi = [sum((-h) ** j / np.prod(np.arange(1, j + k + 1.0)) for j in range(60))
                       for k in (2, 3)]  # fmt: skip
                b = np.array([phi[0], 2 * phi[1]]) * h / -np.expm1(-h)
                a = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), b)
                change = a[0] * (known[-2] - D0) / r + a[1] * (D - D0)
            else:
                change = (D - D0) / 2
            x = t / s * start - np.expm1(-h) * (D0 + change)
        known, start = [*known, D][-2:], x
        change = 0
        if i and i < steps - 1:
            r = np.log(levels[i - 1] / levels[i]) / np.log(levels[i] / levels[i + 1])
            change = (D - known[0]) / r / 2
        x = levels[i + 1] / levels[i] * x + (1 - levels[i + 1] / levels[i]) * (D + change)
    return x


def consistency(levels, x):
    """Without the noise that is added before each evaluation but the first."""
    for level in levels[:-1]:
        x = mixture.denoise(x, level)
    return x


BY_HAND = {
    "heun": heun,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
    "ab2": functools.partial(adams_bashforth, order=2),
    "sab2": stabilised,
    "ab3": functools.partial(adams_bashforth, order=3),
    "unipc": unipc,
    "student": consistency,
}


def test_all_solvers_are_tested():
    assert BY_HAND.keys() == solvers.SOLVERS.keys()


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_a_solver_is_its_textbook_form(name, schedule):
    for steps in (8, 12, 30):
        levels = schedules.SCHEDULES[schedule](steps, EDM)
        found = path(solvers.SOLVERS[name].evaluations(levels))[-1]
        assert relative_l2(found, BY_HAND[name](levels, NOISE * levels[0])) < 1e-5


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_a_solver_is_that_of_diffusers(name, steps):
    with np.load(GOLDEN / "diffusers_schedulers.npz") as golden:
        noise, expected = golden["noise"][None], golden[f"{name}_{steps}"]
    found = path(solvers.SOLVERS[name].evaluations(schedules.edm_levels(steps, EDM)), noise)
    assert len(found) == len(expected) == steps
    for x, theirs in zip(found, expected, strict=True):
        assert relative_l2(x[0], theirs) < 1e-5


@pytest.mark.parametrize(
    "name, order",
    # UniC-2 raises the order of UniP-2 by one (Zhao et al. 2023, theorem 3.1).
    [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("ab2", 2), ("sab2", 2), ("ab3", 3), ("unipc", 3)],
)
def test_the_order_of_convergence(name, order, monkeypatch):
    # Coefficients in float64, since errors go below 1e-6
    monkeypatch.setattr(coefficients, "_number", lambda value: np.asarray(value, np.float64)[()])
    noise = np.random.default_rng(1).normal(size=200) * 80

    def at_the_end(solver, steps):  # but for the step to 0, which is as long whatever the steps
        levels = np.append(np.geomspace(80, 0.01, steps + 1), 0.0)
        return exactly(solver.evaluations(levels)[:-1], noise)

    # The median: pixels that begin between two Gaussians converge later.
    reference = at_the_end(solvers.SOLVERS["unipc"], 4000)
    steps = np.array([200, 400, 800])
    found = [at_the_end(solvers.SOLVERS[name], int(n)) for n in steps]
    errors = [np.median(np.abs(x - reference)) for x in found]
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(steps))
    assert np.all(np.abs(slopes - order) < 0.12), slopes


def test_previews_of_every_solver_are_what_the_network_made():
    seen = []

    def watched(x, sigma):
        seen.append(on_host(x, sigma))
        return seen[-1]

    for name, solver in solvers.SOLVERS.items():
        state, steps = solvers.start(jnp.asarray(NOISE, jnp.float32), EDM), 0
        for row in solver.evaluations(schedules.edm_levels(5, EDM)):
            state = solvers.evaluate(watched, state, row)
            if solvers.shows_denoised(row):
                steps += 1
                np.testing.assert_allclose(solvers.denoised(state, row), seen[-1], atol=1e-4)
        assert steps == 5, name


# ------------------------------------------------------------------------------ schedules
OTHER = EdmConfig(sigma_min=0.05, sigma_max=9.0, rho=5.0)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("config", [EDM, OTHER])
@pytest.mark.parametrize("steps", [1, 2, 16])
def test_a_schedule_falls_from_sigma_max_to_0(name, config, steps):
    levels = schedules.SCHEDULES[name](steps, config)
    assert len(levels) == steps + 1 and levels.dtype == np.float64
    assert (levels[0], levels[-1]) == (pytest.approx(config.sigma_max), 0)
    assert np.all(np.diff(levels) < 0)
    if name in ("edm", "exponential") and steps > 1:
        assert levels[-2] == pytest.approx(config.sigma_min)


def test_log_levels_are_even_in_their_logarithm():
    steps = np.diff(np.log1p(schedules.log_levels(12, OTHER) / schedules.LOG_KNEE))
    np.testing.assert_allclose(steps, steps[0])


def test_dense_levels_are_even_in_their_position():
    levels = schedules.dense_levels(12, OTHER)
    position = np.log1p(levels / 0.02) + 4 * levels / (levels + 0.8)
    np.testing.assert_allclose(np.diff(position), -position[0] / 12)


def test_an_unknown_solver():
    with pytest.raises(UserError, match="solver must be one of heun, .*, found 'ddim'"):
        solvers.solver_of("ddim")
