"""Limits of a request: every value from a page is checked here, before anything is sampled."""

import base64
import dataclasses
from collections.abc import Collection
from typing import Any

from microdit_jax.errors import UserError, visible
from microdit_jax.sampling.solvers import SOLVERS, STUDENT


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper bounds of a request's values, of the queue, and of the memory for finished images."""

    prompt_characters: int = 1000
    steps: int = 100
    guidance: float = 20.0
    count: int = 8
    seed: int = 2**32 - 1
    waiting: int = 20  # requests that have not begun
    body_bytes: int = 6_000_000  # of a request, as it comes in, which may hold an image and a mask
    image_pixels: int = 2**24  # of an image that is to be changed
    body_seconds: float = 10.0  # for a request to come in
    connections: int = 200  # at a time, of all pages
    unread_events: int = 16  # of a page that does not read; it gets no previews until it does
    kept_bytes: int = 256 * 2**20  # of finished images; the oldest go first
    kept_jobs: int = 200  # whose events a page may ask for again
    alone_seconds: float = 30.0  # for a page that reloads or lost its network to come back


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """One checked request: `count` images of a prompt, by the model of this name on the page.

    Attributes:
      solver, guidance: of `sampling.settings.Sampler`; None: as the server was started with.
      negative_prompt, strength: likewise.
      image, mask: image files, of an image that is to be changed.
      keep: True if the images are sampled even when the page is closed.
    """

    model: str
    prompt: str
    guidance_scale: float
    num_inference_steps: int
    seed: int
    count: int
    solver: str | None = None
    guidance: str | None = None
    negative_prompt: str = ""
    strength: float | None = None
    image: bytes | None = None
    mask: bytes | None = None
    keep: bool = False


REQUIRED = ("model", "prompt", "guidance_scale", "num_inference_steps", "seed", "count")
GUIDANCES = ("cfg", "interval", "apg")  # kinds that a page may ask for


def read_request(asked: Any, models: Collection[str], limits: Limits = Limits()) -> SampleRequest:
    """Checks a request as parsed from JSON.

    Raises:
      UserError: a key is missing or unknown, or a value has another type or is out of its range.
    """
    names = [field.name for field in dataclasses.fields(SampleRequest)]
    if not isinstance(asked, dict) or not set(REQUIRED) <= set(asked) <= set(names):
        found = ", ".join(sorted(map(str, asked))) if isinstance(asked, dict) else "no object"
        raise UserError(
            f"expected the values {', '.join(REQUIRED)}, found {visible(found, 100) or 'none'}"
        )
    if asked["model"] not in list(models):
        raise UserError(f"expected one of the models {', '.join(models)}; choose one of the list")
    return SampleRequest(
        model=asked["model"],
        prompt=_prompt(asked["prompt"], limits),
        guidance_scale=_number(asked["guidance_scale"], "guidance", 1.0, limits.guidance),
        num_inference_steps=_whole(asked["num_inference_steps"], "steps", 1, limits.steps),
        seed=_whole(asked["seed"], "a seed", 0, limits.seed),
        count=_whole(asked["count"], "images", 1, limits.count),
        solver=_one_of(asked.get("solver"), "a solver", [s for s in SOLVERS if s != STUDENT]),
        guidance=_one_of(asked.get("guidance"), "a kind of guidance", GUIDANCES),
        negative_prompt=_negative(asked.get("negative_prompt"), limits),
        keep=_switch(asked.get("keep", False), "keep"),
        **_edit(asked),
    )


def _edit(asked: dict[str, Any]) -> dict[str, Any]:
    """Checks what belongs to an image that is to be changed."""
    if asked.get("image") is None:
        if asked.get("mask") is not None or asked.get("strength") is not None:
            raise UserError("expected an image with its mask and strength, found none; choose one")
        return {}
    strength = _number(asked.get("strength"), "a strength", 0.01, 1.0)
    image, mask = (_file(asked.get(name), name) for name in ("image", "mask"))
    return {"strength": strength, "image": image, "mask": mask}


def _file(value: Any, what: str) -> bytes | None:
    """Decodes a data: URL of an image file."""
    if value is None:
        return None
    start, comma, data = value.partition(",") if isinstance(value, str) else ("", "", "")
    if not (comma and start.startswith("data:image/") and start.endswith(";base64")):
        raise UserError(f"expected the {what} as an image file, found {_shown(value)}")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise UserError(f"expected the {what} as an image file, found a damaged one") from error


def _one_of(value: Any, what: str, names: Collection[str]) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in names):
        raise UserError(f"expected {what} of {', '.join(names)}, found {_shown(value)}")
    return value


def _switch(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"expected {what} as true or false, found {_shown(value)}")
    return value


def _negative(value: Any, limits: Limits) -> str:
    return "" if value is None or value == "" else _prompt(value, limits)


def _prompt(value: Any, limits: Limits) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError("expected a prompt, found an empty one; say what to show")
    prompt = " ".join(value.split())
    if len(prompt) > limits.prompt_characters:
        raise UserError(
            f"expected a prompt of at most {limits.prompt_characters} characters, found "
            f"{len(prompt)}; shorten it"
        )
    if not prompt.isprintable():
        raise UserError("expected readable text, found control characters in the prompt")
    return prompt


def _whole(value: Any, what: str, low: int, high: int) -> int:
    # JSON's true is a bool, which Python takes for 1.
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(
            f"expected {what} as a whole number from {low} to {high}, found {_shown(value)}"
        )
    return value


def _number(value: Any, what: str, low: float, high: float) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # not a number is between no two
        raise UserError(
            f"expected {what} as a number from {low:g} to {high:g}, found {_shown(value)}"
        )
    return float(value)


def _shown(value: Any) -> str:
    """Formats a value for an error: an empty field of the page comes as null; long ones are cut."""
    if isinstance(value, dict | list):  # nested as deep as the parser could follow
        return "a list" if isinstance(value, list) else "an object"
    return "nothing" if value is None else visible(value, 40)
