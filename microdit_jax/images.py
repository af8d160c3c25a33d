"""PNGs that carry the settings they were sampled with, and captioned grids of them."""

import dataclasses
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from microdit_jax import noise
from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json, write_bytes
from microdit_jax.files.image_files import open_image

KEY = "microdit_jax"  # of the PNG text that holds the settings
OPTIONAL = ("vae", "text_encoder")  # texts that may be None
MAX_STEPS = 100_000  # of the sampler, in an image's settings
MAX_IMAGES = 2**32  # of a set: each has its own initial noise by its index
# Settings of the sampler that came after the first PNGs, and what an image cost
SAMPLER = (
    "solver", "schedule", "guidance", "guidance_interval", "guidance_rescale", "apg",
    "negative_prompt",
)  # fmt: skip
COSTS = ("evaluations", "network_passes")
NUMBERS = {"guidance_interval": 2, "apg": 3}  # settings of several numbers: how many
SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can hold them alone, UTF-8 cannot


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Everything that a sampled image is a function of, as its PNG tells it.

    Attributes:
      model, vae, text_encoder: the network and its towers, as the flags of sample_main.py take
        them; None: the tower that the network is known for.
      ema: the moving average of the weights, where there is one.
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
      evaluations, network_passes: of the network, what the image cost; None: not known.
    """

    model: str
    vae: str | None = None
    text_encoder: str | None = None
    ema: bool = True
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


def to_uint8(images: Float[np.ndarray, "*n H W 3"]) -> UInt8[np.ndarray, "*n H W 3"]:
    """Rounds [0, 1] floats to bytes."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def file_name(index: int, prompt: str) -> str:
    """Returns a short name such as "0003_an-elegant-squirrel-pirate-on-a-ship.png"."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return f"{index:04d}_{slug}.png"


def encode_png(image: Float[np.ndarray, "H W 3"], settings: dict) -> bytes:
    """Encodes [0, 1] floats as a PNG, with the settings as its text "microdit_jax"."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt(KEY, json.dumps(settings, ensure_ascii=False))
    Image.fromarray(to_uint8(image)).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_png(path: Path, image: Float[np.ndarray, "H W 3"], settings: dict) -> None:
    """Writes a PNG with its settings, whole or not at all."""
    write_bytes(path, encode_png(image, settings))


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings that `save_png` wrote into a PNG, whatever they are.

    Raises:
      UserError: no such file, not an image, or one without settings of ours.
    """
    try:
        with open_image(path, formats=("PNG",)) as image:
            found = parse_json(image.info[KEY])
        if not isinstance(found, dict):
            raise ValueError("settings that are no JSON object")
        return found
    # A stranger's file: Pillow answers damage with anything from SyntaxError to zlib.error.
    except Exception as error:
        raise UserError(
            f"expected a PNG made by sample_main.py, with its settings inside, at {visible(path)}, "
            f"found {type(error).__name__}: {visible(error, 200)}; give such a file"
        ) from error


def read_png(path: Path) -> Float[np.ndarray, "H W 3"]:
    """Reads an image as float32 in [0, 1]."""
    with open_image(path, formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"), np.float32) / 255


def is_made_so(path: Path, settings: dict) -> bool:
    """Returns True if the PNG is there, whole, and carries exactly these settings."""
    try:
        found = path.is_file() and read_settings(path) == parse_json(json.dumps(settings))
        return found and read_png(path).size > 0
    except Exception:  # Pillow answers damage with anything
        return False


def captioned_grid(
    rows: Sequence[Float[np.ndarray, "n H W 3"]],
    captions: Sequence[str],
    *,
    columns: int,
    min_side: int = 96,
) -> Float[np.ndarray, "H_grid W_grid 3"]:
    """Lays images out on a sheet with readable captions.

    Args:
      rows: sets of images whose i-th ones stand side by side in cell i: (real, sampled), say, or
        just one entry; each (n, H, W, 3) in [0, 1].
      captions: one for each cell.
      columns: cells in a row.
      min_side: small images are enlarged to at least this many pixels, without smoothing.
    """
    side = rows[0].shape[1]
    scale = -(-min_side // side)
    shown = [to_uint8(images).repeat(scale, axis=1).repeat(scale, axis=2) for images in rows]
    side, pad, font = side * scale, 6, ImageFont.load_default(12)
    width, text_height = len(rows) * side, 44
    cell_width, cell_height = width + 2 * pad, side + text_height + 2 * pad
    lines = -(-len(captions) // columns)
    columns = min(columns, len(captions))
    sheet = Image.new("RGB", (columns * cell_width, lines * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        left, top = (i % columns) * cell_width + pad, (i // columns) * cell_height + pad
        for j, images in enumerate(shown):
            sheet.paste(Image.fromarray(images[i]), (left + j * side, top))
        text = "\n".join(_wrap(caption, font, width)[:3])
        draw.multiline_text((left, top + side + 2), text, fill="black", font=font, spacing=1)
    return np.asarray(sheet, np.float32) / 255


def _wrap(text: str, font, width: int) -> list[str]:
    """Breaks a caption into lines that are at most `width` pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
