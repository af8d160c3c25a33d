"""Solvers of the probability-flow ODE as tables of coefficients for one compiled evaluation.

dx/dsigma = (x - D(x; sigma)) / sigma (EDM, equation 1 with sigma(t) = t) is integrated from
sigma_max to 0. Every solver here evaluates the network once at a time, and computes from the result
and two earlier ones where to evaluate it next, by a linear combination. `evaluate` does that for
any coefficients, so one compiled program serves all solvers and any number of steps: a solver is
a function from noise levels to the coefficients of each evaluation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from microdit_jax.diffusion import Denoiser, EdmConfig, Latents
from microdit_jax.errors import UserError
from microdit_jax.sampling.coefficients import (
    OUTPUTS,
    STAY,
    Evaluation,
    Update,
    mean_weights,
    row,
    slope_row,
    unified,
    update,
)
from microdit_jax.sampling.schedules import Levels, edm_levels

STUDENT = "student"  # the solver of few-step students (training/distill.py), and of nothing else


class SolverState(NamedTuple):
    """The solver's state between two network evaluations, all float32.

    Attributes:
      x: input of the next evaluation.
      x_start: x at the start of the step.
      last, before: outputs of the last evaluation and of the one before, as `Evaluation` says.
    """

    x: Latents
    x_start: Latents
    last: Latents
    before: Latents


def start(noise: Latents, config: EdmConfig) -> SolverState:
    """The state before the first evaluation: standard normal noise times sigma_max."""
    return start_at(noise.astype(jnp.float32) * np.float32(config.sigma_max))


def start_at(x: Latents) -> SolverState:
    """The state before an evaluation at x."""
    # Buffers of their own, since the state is donated from evaluation to evaluation. Zeros made
    # from x are sharded like x.
    return SolverState(x, jnp.copy(x), 0 * x, 0 * x)


def evaluate(denoise: Denoiser, state: SolverState, at: Evaluation) -> SolverState:
    """Evaluates the network once and updates the state.

    Args:
      denoise: D(x, sigma) with sigma (n,).
      at: one of a solver's evaluations; its values may be traced.
    """
    x = state.x
    denoised = denoise(x, jnp.broadcast_to(at.sigma, x.shape[:1]))
    slope = (x - denoised) / at.sigma
    outputs = jnp.where(at.keeps_denoised, denoised, slope), state.last, state.before
    corrected = _updated(state.x_start, at.corrector, outputs)
    x_start = jnp.where(at.restarts, x, corrected)
    return SolverState(_updated(x_start, at.predictor, outputs), x_start, *outputs[:2])


def _updated(x: Latents, update: Update, outputs: tuple[Latents, Latents, Latents]) -> Latents:
    # A sum written out keeps Heun's samples bit for bit what Algorithm 1 gives in float32: its
    # weights 1/2 and 1 are exact, and 0 adds nothing.
    combined = sum(update.weights[j] * output for j, output in enumerate(outputs))
    return x + update.step * (combined - update.pull * x)


def denoised(state: SolverState, at: Evaluation) -> Latents:
    """Recovers D(x; sigma) of an evaluation, for a preview.

    Args:
      state: result of `evaluate`.
      at: the evaluation, one that `shows_denoised`.
    """
    return jnp.where(at.keeps_denoised, state.last, state.x_start - at.sigma * state.last)


def shows_denoised(at: Evaluation) -> bool:
    """Returns True if the state still holds what `denoised` needs: one that begins a step."""
    return bool(at.restarts or at.keeps_denoised)


def sample(
    denoise: Denoiser, noise: Latents, evaluations: list[Evaluation], config: EdmConfig
) -> Latents:
    """Runs a solver as one loop.

    The reference keeps the trajectory in float64 and rounds to float32 at every network call. Here
    the coefficients are computed in float64 and the state is float32. Each update rounds x by about
    1e-7 of its size, no more than the reference's rounding does, and no two terms cancel, since
    sigma only falls. The result stays within 1e-5 of the reference's 30-step float64 trajectory
    (tests/test_diffusion.py) without 64-bit mode, which TPUs lack.

    Args:
      denoise: D(x, sigma) with sigma (n,).
      noise: standard normal, (n, height, width, channels).
      evaluations: all of a solver's.
    Returns:
      Denoised latents, float32.
    """
    # The loop runs over evaluations, not steps, so that the network is traced once.
    state, _ = jax.lax.scan(
        lambda state, at: (evaluate(denoise, state, at), None),
        start(noise, config),
        jax.tree.map(lambda *values: np.stack(values), *evaluations),
    )
    return state.x


# ---------------------------------------------------------------- the solvers
@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver, and what it is best used with.

    Attributes:
      evaluations: noise levels (n + 1,) float64, falling to 0 -> coefficients.
      schedule: name of the schedule it takes unless asked otherwise.
      steps: number of steps it takes unless asked otherwise.
      min_steps: number of steps below which it has no order of its own.
      renoises: each level's noise is added anew before its evaluation.
    """

    evaluations: Callable[[Levels], list[Evaluation]]
    schedule: str
    steps: int
    min_steps: int = 1
    renoises: bool = False


def heun(levels: Levels, hats: Float64[np.ndarray, " n"] | None = None) -> list[Evaluation]:
    """Heun's second-order steps (EDM, Algorithms 1 and 2): 2 n - 1 evaluations for n steps.

    Row 2i evaluates D at sigma_i and predicts x at sigma_{i+1} (Euler); row 2i + 1 evaluates D
    there and corrects (Heun). The last step, to sigma 0, is Euler's alone.

    Args:
      hats: levels to which noise was raised at the beginning of each step; None: not raised.
    """
    rows = []
    for now, following in zip(levels[:-1] if hats is None else hats, levels[1:], strict=True):
        rows.append(slope_row(now, following - now, [1.0]))
        if following > 0:
            corrector = update(following - now, [0.5, 0.5])
            rows.append(row(following, corrector=corrector))
    return rows


def euler(levels: Levels) -> list[Evaluation]:
    """Euler's steps in sigma, which are DDIM's (Song et al. 2020): an evaluation each."""
    return adams_bashforth(levels, order=1)


def adams_bashforth(levels: Levels, order: int = OUTPUTS) -> list[Evaluation]:
    """Adams-Bashforth in sigma on any levels: an evaluation a step.

    The slope dx/dsigma is interpolated by the polynomial through its last `order` values, fewer at
    the beginning, and integrated to the next level (Hairer, Norsett and Wanner, Solving Ordinary
    Differential Equations I, III.1 and III.5).
    """
    rows = []
    for i in range(len(levels) - 1):
        known = levels[max(i - order + 1, 0) : i + 1][::-1]
        step = levels[i + 1] - levels[i]
        rows.append(slope_row(levels[i], step, mean_weights(known, levels[i], levels[i + 1])))
    return rows


def stabilised_adams_bashforth(levels: Levels) -> list[Evaluation]:
    """Adams-Bashforth of the second order that bears longer steps: an evaluation a step.

    The step is that of the second order less what the third would add, 2 AB2 - AB3. Its error is
    of the second order still, but its three weights alternate less and are smaller, and guidance
    at a large scale, which makes the equation stiff, shakes it later (docs/sampling.md).
    """
    rows = []
    for second, third in zip(adams_bashforth(levels, 2), adams_bashforth(levels, 3), strict=True):
        weights = 2 * second.predictor.weights - third.predictor.weights
        rows.append(second._replace(predictor=second.predictor._replace(weights=weights)))
    return rows


def dpmpp_2m(levels: Levels) -> list[Evaluation]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2): an evaluation a step.

    With lambda = -ln sigma, h = lambda' - lambda and r = h_before / h:
    x' = (sigma'/sigma) x + (1 - sigma'/sigma) ((1 + 1/(2r)) D - 1/(2r) D_before).
    The first step, and the last one to sigma 0 where h is infinite, are of the first order.
    """
    rows = []
    for i, (now, following) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        extra = 0.0
        if i and following > 0:
            extra = np.log(now / following) / np.log(levels[i - 1] / now) / 2  # 1 / (2r)
        predictor = update(1 - following / now, [1 + extra, -extra], pull=1.0)
        rows.append(row(now, predictor=predictor, keeps_denoised=True, restarts=True))
    return rows


def unipc(levels: Levels) -> list[Evaluation]:
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023, arXiv 2302.04867): an evaluation a step.

    UniC corrects each step by the evaluation at its end, which UniP's next step uses as well
    (Algorithms 1 and 2, data prediction). In units of the exponential integrator's step
    1 - sigma'/sigma, both add a combination of (D_m - D_0) / r_m to D_0, the D at its beginning.
    The first step is of the first order, and so is the last, to sigma 0, which is not corrected.
    """
    rows, steps = [], len(levels) - 1
    log_snr = [-np.log(level) for level in levels[:-1]]
    for i in range(steps):
        corrector, order = STAY, min(2, i + 1, steps - i)
        if i:
            h = log_snr[i] - log_snr[i - 1]
            ratios = [(log_snr[i - 2] - log_snr[i - 1]) / h] if min(2, i, steps - i + 1) > 1 else []
            # D_0 is the last evaluation's, D_1 (r = 1) this one's, D_2 that before the last.
            added = unified(h, [*ratios, 1.0])
            older = [gain / ratio for gain, ratio in zip(added, ratios, strict=False)]
            weights = [added[-1], 1 - added[-1] - sum(older), *older]
            corrector = update(1 - levels[i] / levels[i - 1], weights, pull=1.0)
        extra = 0.0
        if order > 1:  # UniP-2: a half of (D_1 - D_0) / r_1
            extra = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1]) / 2
        predictor = update(1 - levels[i + 1] / levels[i], [1 + extra, -extra], pull=1.0)
        updates = {"corrector": corrector, "predictor": predictor}
        rows.append(row(levels[i], **updates, keeps_denoised=True, restarts=i == 0))
    return rows


def consistency(levels: Levels) -> list[Evaluation]:
    """Samples a consistency function (Song et al. 2023, arXiv 2303.01469, Algorithm 1).

    Each evaluation gives an image, to which the next level's noise is added (`Solver.renoises`).
    """
    to_denoised = update(1.0, [1.0], pull=1.0)
    return [
        row(level, predictor=to_denoised, keeps_denoised=True, restarts=True)
        for level in levels[:-1]
    ]


SOLVERS = {
    "heun": Solver(heun, "edm", 30),
    "euler": Solver(euler, "dense", 50),
    "dpmpp_2m": Solver(dpmpp_2m, "dense", 20, min_steps=2),
    "ab2": Solver(functools.partial(adams_bashforth, order=2), "dense", 16, min_steps=2),
    "sab2": Solver(stabilised_adams_bashforth, "dense", 16, min_steps=3),
    "ab3": Solver(adams_bashforth, "dense", 16, min_steps=3),
    "unipc": Solver(unipc, "dense", 20, min_steps=2),
    STUDENT: Solver(consistency, "student", 4, renoises=True),
}


def solver_of(name: str) -> Solver:
    """Returns a solver by its name; raises UserError if there is none such."""
    if name not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}, found {name!r}")
    return SOLVERS[name]


def heun_evaluations(num_steps: int, config: EdmConfig) -> list[Evaluation]:
    """Returns the evaluations of the default: Heun's steps on the levels of EDM's equation 5."""
    return heun(edm_levels(num_steps, config))
