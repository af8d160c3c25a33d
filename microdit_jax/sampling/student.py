"""Few-step students: what is recorded of them beside their weights, and how they are sampled."""

import dataclasses
import math
from typing import Any

from microdit_jax.errors import UserError, visible
from microdit_jax.sampling.guidance import REFERENCE_SCALE
from microdit_jax.sampling.solvers import STUDENT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """A network that was distilled from a guided teacher (training/distill.py).

    Attributes:
      teacher: name or path of the network that it learned from.
      guidance_scale: of the teacher, built into the student.
      guidance_interval: noise levels (low, high) in which the teacher was guided.
      weights: sha256 of the teacher's weights.
    """

    teacher: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    weights: str

    @classmethod
    def from_dict(cls, found: Any, where: str) -> "Student | None":
        """Reads what a model's config.json says; None where it is no student's.

        Args:
          where: the file, for errors.
        Raises:
          UserError: something else than a student's record.
        """
        if found is None:
            return None
        try:
            low, high = map(float, found["guidance_interval"])
            student = cls(
                teacher=str(found["teacher"]),
                guidance_scale=float(found["guidance_scale"]),
                guidance_interval=(low, high),
                weights=str(found["weights"]),
            )
            if not math.isfinite(student.guidance_scale):
                raise ValueError("a guidance_scale that is not finite")
            return student
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"expected a student's teacher, guidance_scale, guidance_interval and weights in "
                f"{visible(where)}, found {type(error).__name__}: {visible(error, 100)}"
            ) from error


def settled(chosen: dict[str, Any], student: Student | None) -> dict[str, Any]:
    """Returns a sampler's settings with those that the network decides filled in.

    Args:
      chosen: fields of `settings.Sampler`; None stands for one that is not chosen.
      student: of the network; None: it is none.
    Raises:
      UserError: a student with another solver or guidance than its own, or the solver of students
        for a network that is none.
    """
    chosen = {name: value for name, value in chosen.items() if value is not None}
    solver = chosen.get("solver", "heun" if student is None else STUDENT)
    if student is None:
        if solver == STUDENT:
            raise UserError(
                "solver=student is for few-step students, found another network; give one that "
                "configs/distill.py trained, or another solver"
            )
        return {"guidance_scale": REFERENCE_SCALE} | chosen
    if solver != STUDENT:
        raise UserError(
            f"a few-step student takes solver=student alone, found solver={solver}; its teacher is "
            f"{visible(student.teacher)}"
        )
    scale = chosen.get("guidance_scale", student.guidance_scale)
    if scale != student.guidance_scale:
        raise UserError(
            f"the student has a guidance_scale of {student.guidance_scale:g} built in, found "
            f"{scale:g} asked for; leave it out"
        )
    return chosen | {"solver": STUDENT, "guidance_scale": scale}
