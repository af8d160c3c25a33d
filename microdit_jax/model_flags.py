"""The flags that all sampling commands share: a network's towers, its computation, the sampler.

MODEL = flags.DEFINE_string("model", ...)     one name or several, as the command needs it
flags.adopt_module_key_flags(model_flags)     --help shows the shared ones too
pipe, model = model_flags.load(MODEL.value)
"""

import time
from typing import TYPE_CHECKING, Any

from absl import flags

from microdit_jax.errors import UserError, visible

if TYPE_CHECKING:  # loading these takes a second, and --help should not
    from microdit_jax.assets.load import Model
    from microdit_jax.sampling.pipeline import LatentDiffusion

VAE = flags.DEFINE_string(
    "vae", None, "Its VAE, as a file, a folder or a repository; default: the one it is known for."
)
TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "Its text encoder, likewise.")
BASE = flags.DEFINE_string(
    "base", None, "Of a run that trained adapters, the network that they belong to; needed unless "
    "that is known by its name."
)  # fmt: skip
EMA = flags.DEFINE_boolean("ema", True, "Use the moving average of the weights where there is one.")
EMA_LENGTH = flags.DEFINE_float(
    "ema_length", None, "Of a run with ema.snapshot_every: the average of this length (sigma_rel, "
    "such as 0.1), made from its snapshots."
)  # fmt: skip
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Type of the computation; default: a training run's "
    "own, else bfloat16, on a CPU float32."
)  # fmt: skip
FSDP = flags.DEFINE_integer(
    "fsdp", 0, "Devices over which each weight is split; 0: one, or more where it does not fit.",
    lower_bound=0,
)  # fmt: skip

SOLVER = flags.DEFINE_string(
    "solver",
    None,
    "heun (the reference's), euler, dpmpp_2m, ab2, sab2, ab3 or unipc: docs/sampling.md; student, "
    "for few-step students; default: student for them, else heun.",
)
SCHEDULE = flags.DEFINE_string(
    "schedule", None, "Noise levels: edm, log, dense, exponential or student; default: the "
    "solver's own."
)  # fmt: skip
GUIDANCE = flags.DEFINE_string(
    "guidance",
    "cfg",
    "cfg (classifier-free), interval, apg, cfgpp with --solver=euler, or auto, "
    "by a weaker network.",
)
INTERVAL = flags.DEFINE_list(
    "guidance_interval", None, "Noise levels low,high between which --guidance=interval guides."
)
RESCALE = flags.DEFINE_float(
    "guidance_rescale", 0.0, "How far guidance's contrast is brought back, from 0 to 1."
)
APG = flags.DEFINE_list(
    "apg", None, "Parallel weight, momentum and norm of --guidance=apg; default: 0,-0.5,0."
)
NEGATIVE_PROMPT = flags.DEFINE_string(
    "negative_prompt", "", "What guidance leads away from; default: the zero caption."
)
CHURN = flags.DEFINE_list(
    "churn", None, "S_churn,S_tmin,S_tmax,S_noise of EDM's stochastic sampler, with --solver=heun: "
    "40,0.05,50,1.003."
)  # fmt: skip
WEAKER = flags.DEFINE_string(
    "weaker", None, "Of --guidance=auto: a step of the run's checkpoints, or another network of "
    "the same sizes; default: the run's oldest checkpoint."
)  # fmt: skip

# The flags among an image's settings, by the names of images.ImageSettings
SAMPLER_FLAGS = (SOLVER, SCHEDULE, GUIDANCE, INTERVAL, RESCALE, APG, NEGATIVE_PROMPT, CHURN)
IMAGE_FLAGS = (VAE, TEXT_ENCODER, EMA, EMA_LENGTH, DTYPE)


def load(name: str, weights: str | None = None) -> "tuple[LatentDiffusion, Model]":
    """Loads the network `name` as the flags ask for it, by `create.load`; prints the time it took.

    Args:
      weights: as `assets.load_model` takes it.
    Raises:
      UserError: something is not there, is damaged, or does not fit the rest.
    """
    import jax

    from microdit_jax import create

    start = time.perf_counter()
    pipe, model = create.load(
        name, **image_settings(), fsdp=FSDP.value, weights=weights, base=BASE.value
    )
    if GUIDANCE.value == "auto":
        pipe = create.with_weaker(pipe, model, WEAKER.value)
    elif WEAKER.value is not None:
        raise UserError(f"--weaker is for --guidance=auto, found --guidance={GUIDANCE.value}")
    if jax.process_index() == 0:
        print(f"{pipe.description}: loaded in {time.perf_counter() - start:.1f} s", flush=True)
    return pipe, model


def sampler_settings() -> dict[str, Any]:
    """Returns the values of SAMPLER_FLAGS by name, as `sampling.settings.Sampler` takes them.

    The solver is left out where it is not chosen: that goes by the network.

    Raises:
      UserError: something else where a flag takes numbers.
    """
    values: dict[str, Any] = {flag.name: flag.value for flag in SAMPLER_FLAGS}
    for flag, count in ((INTERVAL, 2), (APG, 3), (CHURN, 4)):
        if flag.value is None:
            continue
        try:
            values[flag.name] = tuple(map(float, flag.value))
        except ValueError as error:
            raise UserError(
                f"--{flag.name} takes numbers divided by commas, found {visible(flag.value)}"
            ) from error
        if len(flag.value) != count:
            raise UserError(f"--{flag.name} takes {count} numbers, found {visible(flag.value)}")
    if SOLVER.value is None:
        del values[SOLVER.name]
    return values


def image_settings() -> dict[str, Any]:
    """Returns the values of IMAGE_FLAGS by name."""
    return {flag.name: flag.value for flag in IMAGE_FLAGS}
