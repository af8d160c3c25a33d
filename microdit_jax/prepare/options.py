"""Options that decide the records of a prepared dataset, beside its source and its towers."""

import dataclasses

from microdit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Options of turning images and captions into records; kept in the output's job.json.

    Attributes:
      resolutions: pixels of a side, each a multiple of 8.
      min_size: images whose shorter side has fewer pixels are skipped.
      seed: of the noise that latents are sampled with.
      batch: images that a device encodes at a time.
      clean: clean the captions.
      caption_store: "embeddings", "tokens" or "both".
      exif: turn images as the camera's orientation says.
    """

    resolutions: tuple[int, ...]
    min_size: int
    seed: int
    batch: int
    clean: bool = True
    caption_store: str = "embeddings"
    exif: bool = False

    def __post_init__(self):
        """Raises UserError, naming the flag, for a value out of range."""
        sides = self.resolutions
        if not sides or min(sides) < 8 or any(side % 8 for side in sides):
            found = ", ".join(map(str, sides))
            raise UserError(f"--resolutions must be multiples of 8, found {found}")
        if len(set(sides)) != len(sides):
            raise UserError(f"--resolutions must differ, found {sides}")
        if self.caption_store not in ("embeddings", "tokens", "both"):
            raise UserError(
                f"--captions_as must be embeddings, tokens or both, found {self.caption_store!r}"
            )
        for name, least in (("batch", 1), ("min_size", 0), ("seed", 0)):
            if (found := getattr(self, name)) < least:
                raise UserError(f"--{name} must be at least {least}, found {found}")

    @property
    def columns(self) -> dict[str, str]:
        """Columns of a record, each with its MDS encoding; arrays are stored as raw bytes."""
        arrays = [f"latents_{side}" for side in self.resolutions]
        arrays += ["caption_latents"] if self.stores_embeddings else []
        arrays += ["caption_tokens"] if self.stores_tokens else []
        return {"id": "str", "caption": "str"} | dict.fromkeys(arrays, "bytes")

    @property
    def stores_embeddings(self) -> bool:
        """True if records hold the captions' embeddings."""
        return self.caption_store != "tokens"

    @property
    def stores_tokens(self) -> bool:
        """True if records hold the captions' token ids."""
        return self.caption_store != "embeddings"
