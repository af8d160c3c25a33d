"""Settings of the sampler: solver, schedule and guidance, and the evaluations they amount to."""

import dataclasses
import math
from typing import NamedTuple

from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.sampling import solvers
from microdit_jax.sampling.churn import Churn
from microdit_jax.sampling.coefficients import Evaluation
from microdit_jax.sampling.guidance import KINDS, Form, Strength
from microdit_jax.sampling.schedules import SCHEDULES, Levels
from microdit_jax.sampling.solvers import STUDENT, shows_denoised, solver_of

INTERVAL = (0.05, 1.5)  # noise levels in which guidance="interval" guides unless asked otherwise
APG = (0.0, -0.5, 0.0)  # eta, beta and r of guidance="apg" unless asked otherwise


class PlannedEvaluation(NamedTuple):
    """One evaluation of a run, as `programs.evaluate_network` takes it.

    Attributes:
      at: the solver's row.
      form: program to run.
      strength: of its guidance.
      step: index of the step that it begins, for a preview; None for a correction.
      noise: deviation of the noise that is added to x before it; 0 for none.
    """

    at: Evaluation
    form: Form
    strength: Strength
    step: int | None
    noise: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Everything that says how noise becomes an image, but the network and the noise.

    Attributes:
      solver: one of `solvers.SOLVERS`.
      num_inference_steps: steps; None: the solver's own number.
      schedule: one of `schedules.SCHEDULES`; None: the solver's own.
      guidance: "cfg", classifier-free guidance; "interval", the same at some noise levels alone;
        "apg", adaptive projected guidance; "cfgpp", CFG++, for the solver "euler"; "auto",
        autoguidance by a weaker network with the same caption.
      guidance_scale: g in uncond + g (cond - uncond): 0 is the unconditional model and 1 the
        conditional one, each in one pass of the network; any other takes two. Of "cfgpp" lambda,
        in (0, 1].
      guidance_interval: noise levels (low, high) of "interval": guidance acts at low < sigma <=
        high, and elsewhere there is none; None: INTERVAL.
      guidance_rescale: phi of rescaled guidance, 0 (off) to 1.
      apg: eta, beta and r of "apg": weight of the parallel part, momentum, and bound of the norm
        (0: none); None: APG.
      negative_prompt: a prompt in place of the zero caption; "" for none.
      churn: of the solver "heun", as `churn.Churn` has it; None for none.
      strength: of what happens to a given image, in (0, 1]: the share of the steps that are taken,
        the last ones; None: there is no image.

    Raises:
      UserError: a value out of its range, or settings that do not go together.
    """

    solver: str = "heun"
    num_inference_steps: int | None = None
    schedule: str | None = None
    guidance: str = "cfg"
    guidance_scale: float = 5.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    apg: tuple[float, float, float] | None = None
    negative_prompt: str = ""
    churn: tuple[float, float, float, float] | None = None
    strength: float | None = None

    def __post_init__(self):
        solver = solver_of(self.solver)
        for name, default in (
            ("num_inference_steps", solver.steps),
            ("schedule", solver.schedule),
            ("guidance_interval", INTERVAL if self.guidance == "interval" else None),
            ("apg", APG if self.guidance == "apg" else None),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.steps < solver.min_steps:
            raise UserError(
                f"num_inference_steps must be at least {solver.min_steps} for the solver "
                f"{self.solver}, found {self.steps}"
            )
        self._check_guidance()
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"schedule must be one of {', '.join(SCHEDULES)}, found {self.schedule!r}"
            )
        if self.churn is not None:
            Churn(*self.churn).check()
            if self.solver != "heun":
                raise UserError(f"churn is for solver=heun, found solver={self.solver}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UserError(f"strength must be above 0 and up to 1, found {self.strength:g}")

    @property
    def steps(self) -> int:
        """The number of steps, which is known once the solver is."""
        assert self.num_inference_steps is not None
        return self.num_inference_steps

    def _check_guidance(self) -> None:
        scale, kind = self.guidance_scale, self.guidance
        if kind not in KINDS:
            raise UserError(f"guidance must be one of {', '.join(KINDS)}, found {kind!r}")
        if not math.isfinite(scale):
            raise UserError(f"guidance_scale must be a finite number, found {scale}")
        if scale < 0:
            raise UserError(
                f"guidance_scale must not be negative, found {scale:g}; 0 is the unconditional "
                "model, 1 is no guidance, more follows the prompt more closely"
            )
        if kind == "cfgpp" and (self.solver != "euler" or not 0 < scale <= 1):
            raise UserError(
                "guidance=cfgpp takes solver=euler and a guidance_scale above 0 and up to 1, found "
                f"solver={self.solver} and {scale:g}"
            )
        if kind == "auto" and (scale < 1 or self.guidance_rescale):
            raise UserError(
                "guidance=auto takes a guidance_scale of 1 or more and no guidance_rescale, found "
                f"{scale:g} and {self.guidance_rescale:g}"
            )
        for name, owner in (("guidance_interval", "interval"), ("apg", "apg")):
            if getattr(self, name) is not None and kind != owner:
                raise UserError(f"{name} is for guidance={owner}, found guidance={kind}")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high:
                raise UserError(
                    f"guidance_interval must be two noise levels 0 <= low < high, found {low:g} "
                    f"and {high:g}"
                )
        if self.apg is not None and (not all(map(math.isfinite, self.apg)) or self.apg[2] < 0):
            raise UserError(
                "apg must be three finite numbers, the last of them not negative, found "
                f"{', '.join(f'{value:g}' for value in self.apg)}"
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale must be in [0, 1], found {self.guidance_rescale:g}")
        if self.solver == STUDENT and (kind != "cfg" or self.guidance_rescale):
            raise UserError(
                "a student's guidance is built in: solver=student takes no guidance, "
                f"guidance_interval, apg or guidance_rescale, found guidance={kind}"
            )
        if self.negative_prompt and (self.solver == STUDENT or kind == "auto"):
            raise UserError(
                "negative_prompt needs guidance by another caption, found "
                f"{'a student' if self.solver == STUDENT else 'guidance=auto'}; leave it out"
            )
        unguided = scale in (0, 1) and kind != "cfgpp"
        if self.negative_prompt and unguided:
            raise UserError(
                "negative_prompt needs guidance, found none: give a guidance_scale other than "
                f"{scale:g}"
            )

    def plan(self, config: EdmConfig) -> list[PlannedEvaluation]:
        """Lists the network evaluations of one run.

        Raises:
          UserError: an interval of guidance that holds none of the schedule's noise levels.
        """
        levels, plan, steps = self.levels(config), [], 0
        for at, noise in self._evaluations(levels):
            scale = self._scale(at)
            step = steps if shows_denoised(at) else None
            steps += step is not None
            form, strength = self._form(scale), self._strength(scale)
            plan.append(PlannedEvaluation(at, form, strength, step, noise))
        if self.guidance_interval is not None and self.guidance_scale != 1:
            if all(evaluation.form == Form.CONDITIONAL for evaluation in plan):
                low, high = self.guidance_interval
                raise UserError(
                    "guidance_interval must hold some of the schedule's noise levels, "
                    f"{levels[0]:g} to {levels[-2]:g}, found {low:g} to {high:g}; give a wider "
                    "interval, or guidance_scale=1"
                )
        return plan

    def levels(self, config: EdmConfig) -> Levels:
        """Returns the noise levels from the first to 0; with a strength, the last ones alone."""
        assert self.schedule is not None
        levels = SCHEDULES[self.schedule](self.steps, config)
        if self.strength is None:
            return levels
        return levels[self.steps - max(round(self.strength * self.steps), 1) :]

    def _evaluations(self, levels: Levels) -> list[tuple[Evaluation, float]]:
        """Lists the solver's evaluations, each with the noise that is added before it."""
        solver = solver_of(self.solver)
        if self.churn is not None and self.churn[0]:
            hats, added = Churn(*self.churn).raised(levels, self.steps)
            rows, noises = solvers.heun(levels, hats), list(added)
        else:
            rows = solver.evaluations(levels)
            noises = [0.0, *levels[1:-1]] if solver.renoises else [0.0] * len(rows)
        noises = iter(noises)
        return [(at, float(next(noises)) if at.restarts else 0.0) for at in rows]

    def forms(self) -> set[Form]:
        """Lists the programs that runs of these settings need, whatever their noise levels."""
        guided = {self._form(self.guidance_scale if self.guidance != "cfgpp" else 2.0)}
        return guided | ({Form.CONDITIONAL} if self.guidance == "interval" else set())

    def _scale(self, at: Evaluation) -> float:
        """Returns the guidance scale of an evaluation."""
        sigma = float(at.sigma)
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            return self.guidance_scale if low < sigma <= high else 1.0
        if self.guidance == "cfgpp":
            # x' = D_uncond + lambda (D_cond - D_uncond) + sigma' (x - D_uncond) / sigma (Chung et
            # al. 2024, arXiv 2406.08070, Algorithm 2) is Euler's step with this scale.
            return self.guidance_scale * sigma / -float(at.predictor.step)
        return self.guidance_scale

    def _form(self, scale: float) -> Form:
        if scale == 1 and self.guidance != "cfgpp" or self.solver == STUDENT:
            return Form.CONDITIONAL
        if self.guidance == "auto":
            return Form.AUTO
        if scale == 0:
            return Form.UNCONDITIONAL
        return Form.ADJUSTED if self.guidance_rescale or self.apg else Form.GUIDED

    def _strength(self, scale: float) -> Strength:
        numbers = (scale, self.guidance_rescale, *(self.apg or (1.0, 0.0, 0.0)))
        return Strength(*numbers).as_float32()


def network_passes(plan: list[PlannedEvaluation]) -> int:
    """Counts the passes of the network that one image takes; a guided evaluation is two."""
    return sum(evaluation.form.passes for evaluation in plan)
