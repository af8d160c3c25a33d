"""The teacher of a few-step student: its network, and what a student's run takes over from it."""

import copy
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from microdit_jax.assets import load
from microdit_jax.assets.load import Model
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.checkpoints.weights import weights_digest
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError, visible
from microdit_jax.sampling.student import Student
from microdit_jax.training.distill import StudentLoss
from microdit_jax.training.source import take_sizes

ARCH = "teacher"  # config.model.arch of a student that has the sizes of its teacher


class Teacher(NamedTuple):
    """A frozen network that a run distils.

    Attributes:
      params: its weights, sharded like the student's; they are also where the student starts.
      record: what is recorded of it beside the student's weights.
      description: tells a person what was loaded.
    """

    params: Any
    record: Student
    description: str


def load_teacher(config: ConfigDict, mesh: Mesh) -> tuple[ConfigDict, Teacher | None]:
    """Loads the network that config.teacher names.

    Returns:
      The config, with what is the teacher's filled in: sizes, data, sigma_data; and the teacher,
      None if the config names none.
    Raises:
      UserError: nothing usable there, a few-step student, or data that nothing names.
    """
    if not config.teacher:
        return config, None
    model = load.load_model(config.teacher, mesh=mesh)
    if model.student is not None:
        raise UserError(
            f"expected a teacher that takes many steps, found a few-step student, "
            f"{visible(model.description)}; give its own teacher, {visible(model.student.teacher)}"
        )
    settings = config.distill
    record = Student(
        teacher=config.teacher,
        guidance_scale=settings.guidance_scale,
        guidance_interval=tuple(settings.guidance_interval),
        weights=weights_digest(model.params),
    )
    return filled_in(config, model), Teacher(model.params, record, model.description)


def filled_in(config: ConfigDict, model: Model) -> ConfigDict:
    """Returns a copy of the config with the teacher's sizes and data where it leaves them open."""
    config = copy.deepcopy(config)
    config.edm.sigma_data = model.edm.sigma_data
    if config.model.arch == ARCH:
        take_sizes(config, model.config, kept=("attention", "remat"))
    if not config.data.datasets:
        if model.folder is None:
            raise UserError(
                f"{visible(model.description)} does not say what data it was trained on; give "
                "data.datasets and data.heldout"
            )
        data = read_run_metadata(model.folder, "config.data")["config"]["data"]
        known = {name: value for name, value in data.items() if name in config.data}
        heldout = known.pop("heldout", {})
        config.data.update(known | {"datasets": tuple(data["datasets"]), "caption_drop": 0.0})
        config.data.heldout.update(heldout)
    return config


def student_loss(config: ConfigDict) -> StudentLoss | None:
    """Returns the loss of a run that distils a teacher; None for one that does not."""
    if not config.teacher:
        return None
    settings = config.distill
    return StudentLoss(
        edm=EdmConfig(**config.edm),
        guidance_scale=settings.guidance_scale,
        guidance_interval=tuple(settings.guidance_interval),
        trajectory_steps=settings.trajectory_steps,
        from_noise=settings.from_noise,
    )
