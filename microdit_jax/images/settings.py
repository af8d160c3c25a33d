"""Settings of a sampled image, which its file carries, and their checks."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from microdit_jax import noise
from microdit_jax.errors import UserError

OPTIONAL = ("vae", "text_encoder")  # texts that may be None
MAX_STEPS = 100_000  # of the sampler, in an image's settings
MAX_IMAGES = 2**32  # of a set: each has its own initial noise by its index
# Files that an image may be made from, and their checksums
FILES = ("weaker", "image", "image_sha256", "mask", "mask_sha256")
# Settings that came after the first PNGs, and what an image cost
SAMPLER = (
    "ema_length", "solver", "schedule", "guidance", "guidance_interval", "guidance_rescale", "apg",
    "negative_prompt", "churn", "strength", *FILES,
)  # fmt: skip
COSTS = ("evaluations", "network_passes")
# Settings of several numbers: how many
NUMBERS = {"guidance_interval": 2, "apg": 3, "churn": 4}
SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can hold them alone, UTF-8 cannot


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Everything that a sampled image is a function of, as its PNG tells it.

    Attributes:
      model, vae, text_encoder: the network and its towers, as the flags of sample_main.py take
        them; None: the tower that the network is known for.
      ema: the moving average of the weights, where there is one.
      ema_length: sigma_rel of an average from a run's snapshots; None: another average, or none.
      dtype: type of the computation; None: chosen by model and machine.
      num_inference_steps: steps of the solver, up to MAX_STEPS.
      guidance_scale: classifier-free guidance; 1 means none.
      solver, schedule, guidance, guidance_interval, guidance_rescale, apg, negative_prompt: as
        `sampling.settings.Sampler` takes them.
      seed: of the initial noise, below 2**64.
      noise: one of `noise.KINDS`.
      of: images in the set that was sampled.
      made_with: a person's description of the network.
      prompt: what was asked for.
      index: the image's index in its set.
      churn, strength: likewise.
      weaker: the network of guidance="auto", as the flag takes it.
      image, mask: paths of the image that was changed, and of its mask; None: there was none.
      image_sha256, mask_sha256: of these files.
      evaluations, network_passes: of the network, what the image cost; None: not known.
    """

    model: str
    vae: str | None = None
    text_encoder: str | None = None
    ema: bool = True
    ema_length: float | None = None
    dtype: str | None = None
    num_inference_steps: int
    guidance_scale: float
    seed: int
    noise: str = "jax"
    of: int
    made_with: str = ""
    prompt: str
    index: int
    solver: str = "heun"
    schedule: str | None = None
    guidance: str = "cfg"
    guidance_interval: tuple[float, ...] | None = None
    guidance_rescale: float = 0.0
    apg: tuple[float, ...] | None = None
    negative_prompt: str = ""
    churn: tuple[float, ...] | None = None
    strength: float | None = None
    weaker: str | None = None
    image: str | None = None
    image_sha256: str | None = None
    mask: str | None = None
    mask_sha256: str | None = None
    evaluations: int | None = None
    network_passes: int | None = None

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "ImageSettings":
        """Takes what flags or a PNG say, which may be a stranger's; other keys are left out.

        PNGs from before there were other solvers than Heun's say nothing of one. Guidance of 1 or
        less was none then.

        Raises:
          UserError: a key is missing, or a value is of another type or out of its range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        missing = sorted(set(names) - found.keys() - {"made_with", *SAMPLER, *COSTS})
        if missing:
            raise UserError(
                f"expected the PNG of one image, found one that does not say {', '.join(missing)}; "
                "take one from the folder images/"
            )
        values: dict[str, Any] = {name: found[name] for name in names if name in found}
        made_with = values.get("made_with", "")
        _check_text(values, "model", "prompt")
        _check_text({name: text for name, text in values.items() if text is not None}, *OPTIONAL)
        _check(values | {"made_with": made_with}, "made_with", "a text", _is_encodable)
        _check(values, "ema", "true or false", lambda value: isinstance(value, bool))
        _check_one_of(values, "dtype", [None, "float32", "bfloat16"])
        _check_one_of(values, "noise", noise.KINDS)
        _check(values, "guidance_scale", "a finite number", _is_finite)
        _check_whole(values, "num_inference_steps", 1, MAX_STEPS)
        _check_whole(values, "seed", 0, 2**64 - 1)
        _check_whole(values, "of", 1, MAX_IMAGES)
        _check_whole(values, "index", 0, values["of"] - 1)
        _check_sampler({name: values[name] for name in (*SAMPLER, *COSTS) if name in values})
        values["guidance_scale"] = float(values["guidance_scale"])
        if "solver" not in found:
            values["guidance_scale"] = max(values["guidance_scale"], 1.0)
        for name in NUMBERS:
            if values.get(name) is not None:
                values[name] = tuple(float(number) for number in values[name])
        return cls(**values)


def _check_sampler(values: dict[str, Any]) -> None:
    """Checks types of those settings that a file may lack; `Sampler` knows which go together."""
    names = {name: values[name] for name in ("solver", "guidance") if name in values}
    if values.get("schedule") is not None:
        names["schedule"] = values["schedule"]
    for name in names:
        _check(names, name, "a short name", lambda value: _is_encodable(value) and len(value) < 32)
    if "negative_prompt" in values:
        _check(values, "negative_prompt", "a text", _is_encodable)
    if "guidance_rescale" in values:
        _check(values, "guidance_rescale", "a finite number", _is_finite)
    for name in ("strength", "ema_length"):
        if values.get(name) is not None:
            _check(values, name, "a finite number", _is_finite)
    for name in FILES:
        if values.get(name) is not None:
            _check_text(values, name)
    for name, count in NUMBERS.items():
        if values.get(name) is not None:
            _check(
                values,
                name,
                f"{count} finite numbers",
                lambda value, count=count: (
                    isinstance(value, list | tuple)
                    and len(value) == count
                    and all(map(_is_finite, value))
                ),
            )
    for name in COSTS:
        if values.get(name) is not None:
            _check_whole(values, name, 1, 4 * MAX_STEPS)


def _check_text(values: dict[str, Any], *names: str) -> None:
    for name in names:
        if name in values:
            _check(values, name, "a text", lambda value: _is_encodable(value) and value.strip())


def _is_encodable(value: Any) -> bool:
    return isinstance(value, str) and not SURROGATES.search(value)


def _check_one_of(values: dict[str, Any], name: str, choices: Sequence[Any]) -> None:
    expected = f"one of {', '.join(str(choice) for choice in choices)}"
    _check(values, name, expected, lambda value: value in choices)


def _check_whole(values: dict[str, Any], name: str, low: int, high: int) -> None:
    def is_whole(value: Any) -> bool:  # JSON's true is a bool, which Python takes for 1
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    _check(values, name, f"a whole number from {low} to {high}", is_whole)


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 1e30  # as float32 too


def _check(
    values: dict[str, Any], name: str, expected: str, is_valid: Callable[[Any], bool]
) -> None:
    if not is_valid(values[name]):
        value = ascii(values[name])
        raise UserError(
            f"expected {name} in an image's settings to be {expected}, found "
            f"{value if len(value) <= 40 else value[:40] + '...'}; give such a value, or a "
            "PNG made by sample_main.py"
        )
