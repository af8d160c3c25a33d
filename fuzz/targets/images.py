"""The reader of the settings inside a PNG, as --again uses them."""

import io

from PIL import Image, PngImagePlugin

from fuzz.grammar import json_document
from fuzz.scratch import Scratch
from fuzz.targets import Read, Target
from microdit_jax import images
from microdit_jax.errors import UserError
from microdit_jax.images.files import KEY


def png_with(text: str, compress: bool = False) -> bytes:
    """Returns a small PNG that carries a text as this project's settings."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt(KEY, text, zip=compress)
    Image.new("RGB", (2, 2)).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def _open(scratch: Scratch) -> Read:
    def read(data: bytes) -> None:
        # A text alone gets a PNG around it: its mutations need no checksums.
        if data[:4] != b"\x89PNG":
            data = png_with(
                data.decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode()
            )
        images.ImageSettings.from_dict(images.read_settings(scratch.file("x.png", data)))

    return read


WORDS = ("model", "vae", "text_encoder", "ema", "dtype", "num_inference_steps", "guidance_scale",
         "seed", "noise", "of", "made_with", "prompt", "index", "solver",
         "schedule", "guidance", "guidance_interval", "guidance_rescale", "apg", "negative_prompt",
         "evaluations", "network_passes")  # fmt: skip
TARGETS = {
    "png_settings": Target(
        _open,
        (UserError, OSError),
        (*(f'"{word}":'.encode() for word in WORDS), b"1e999", b"NaN", b"-1", b"null", b"\\ud800"),
        json_document,
    )
}
