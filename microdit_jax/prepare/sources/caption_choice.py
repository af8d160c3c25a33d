"""The caption of an image where a dataset has a list of them, or something else than a text."""

import dataclasses
import hashlib
from typing import Any

from microdit_jax.errors import UserError

CHOICES = ("first", "random")
# As datasets name the column, member or field with an image's caption; small letters.
CAPTION_NAMES = ("caption", "captions", "text", "txt", "prompt")


@dataclasses.dataclass(frozen=True)
class CaptionChoice:
    """Rule that takes one caption of a list.

    Attributes:
      choice: "first", or "random", which is a function of the seed and the image's id alone.
    """

    choice: str = "first"
    seed: int = 0

    def __post_init__(self):
        """Raises UserError, naming the flag, for another choice."""
        if self.choice not in CHOICES:
            raise UserError(f"--captions_of_a_list must be first or random, found {self.choice!r}")

    def __call__(self, value: Any, id: str) -> str | None:
        """Returns the caption that a dataset's value holds; None for null and empty lists.

        Args:
          value: a text, a number, or a list of those; of other kinds comes no caption.
        """
        if isinstance(value, list | tuple):
            texts = [text for text in value if text is not None]
            if not texts:
                return None
            index = 0
            if self.choice == "random":
                digest = hashlib.sha256(f"{self.seed}/caption/{id}".encode(errors="replace"))
                index = int.from_bytes(digest.digest()[:8], "little") % len(texts)
            value = texts[index]
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return str(value) if isinstance(value, str | int | float) else None


FIRST = CaptionChoice()
