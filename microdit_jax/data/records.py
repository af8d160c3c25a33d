"""Records of stored latents: one type, whatever the files; they know what made them.

A record has
  latents          (h, w, c) float32, sampled from the VAE and multiplied by its scaling factor
  caption_latents  (l, width) float16, or tokens (l,) int32 where the run embeds captions itself
  caption, id      str
  index            int32
Caption embeddings are 79 % of the bytes: they stay float16 up to the devices, because a host that
widens them reads half as many records, and bytes on their way double.
On disk a sample has the columns latents_256 and/or latents_512 (c, h, w), caption_latents
(l, width), both float16, and caption, as the reference has them; ours adds id and caption_tokens.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from microdit_jax.errors import UserError

SIDECAR = "latents.json"
_FORMAT, _VERSION = "microdit_jax latents", 1
# Pixels of an image to numbers of a latent along a side, of all the reference's VAEs.
_REDUCTION = 8


@dataclasses.dataclass(frozen=True)
class LatentInfo:
    """What made the latents of a dataset, and their shapes; stored as latents.json beside them.

    Attributes:
      vae, text_encoder: names, as models carry them.
      latents: pixels of a side -> shape (c, h, w) as stored.
      captions: shape (l, width) of the embeddings, or None where there are none.
      tokens: l of the stored token ids, or None where there are none.
      scaling_factor: of the VAE, for those who decode; None where nobody said.
      attribution: what the licence of the images wants shown.
    """

    vae: str
    text_encoder: str
    latents: dict[int, tuple[int, int, int]]
    captions: tuple[int, int] | None
    tokens: int | None = None
    scaling_factor: float | None = None
    attribution: str = ""

    def to_json(self) -> str:
        """The sidecar's text."""
        head = {"format": _FORMAT, "version": _VERSION}
        return json.dumps(head | dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "LatentInfo":
        """Reads the sidecar; raises UserError where it is none of this format and version."""
        try:
            values = json.loads(text)
            found = values.pop("format"), values.pop("version")
            if found != (_FORMAT, _VERSION):
                raise ValueError(f"found {found}")
            latents = {int(side): _shape(shape, 3) for side, shape in values["latents"].items()}
            captions = values["captions"] and _shape(values["captions"], 2)
            return cls(**values | {"latents": latents, "captions": captions})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"expected {_FORMAT}, version {_VERSION}, in {where}, could not use it ({error}); "
                "copy the file again, or remove it and state what made the data"
            ) from error


def _shape(values: Sequence[int], axes: int) -> tuple[int, ...]:
    if len(values) != axes or not all(type(n) is int and n > 0 for n in values):
        raise ValueError(f"shape {values}")
    return tuple(values)


@runtime_checkable
class Store(Protocol):
    """Random access to the stored bytes: what `MdsReader` is."""

    columns: Mapping[str, str]

    def __len__(self) -> int: ...

    def raw(self, index: int) -> Mapping[str, Any]:
        """The columns of one record, as they are stored."""
        ...

    def where(self, index: int) -> str:
        """In words, where a record is stored, for messages."""
        ...


class StoredLatents:
    """Random access to the records of one dataset; a source for `pipeline.make_dataset`.

    Attributes:
      info: what made the data; vae and text_encoder are also attributes of their own.
    """

    def __init__(
        self,
        store: Store,
        info: LatentInfo,
        *,
        resolution: int,
        captions: str = "embeddings",
        tokenizer: Callable[[list[str]], Any] | None = None,
    ):
        """
        Args:
          resolution: which latents, by the side of their images in pixels.
          captions: "embeddings" as stored, or "tokens" for a run that embeds captions itself.
          tokenizer: gives the ids of a caption where none are stored; see `token_ids`.
        Raises:
          UserError: the dataset has no such latents or captions.
        """
        where = store.where(0).split(" of ", 1)[-1] if len(store) else "an empty dataset"
        if resolution not in info.latents:
            raise UserError(
                f"expected latents of {resolution} px, found those of "
                f"{', '.join(map(str, info.latents))} px in {where}; choose one of them, or "
                "precompute others"
            )
        if captions not in ("embeddings", "tokens"):
            raise UserError(f"captions must be embeddings or tokens, found {captions!r}")
        self._wants = [(f"latents_{resolution}", "<f2", info.latents[resolution])]
        self._tokenizer = None
        if captions == "embeddings":
            if info.captions is None:
                raise UserError(
                    f"expected caption embeddings, found token ids alone in {where}; train with "
                    "captions=tokens, or precompute with --captions_as=embeddings"
                )
            self._wants.append(("caption_latents", "<f2", info.captions))
        elif info.tokens is not None:
            self._wants.append(("caption_tokens", "<i4", (info.tokens,)))
        elif tokenizer is None:
            raise UserError(
                f"expected token ids of captions, found none in {where}, nor a tokenizer to make "
                "them; precompute with --captions_as=tokens, or train with captions=embeddings"
            )
        else:
            self._tokenizer = tokenizer
        if missing := {name for name, *_ in self._wants} - set(store.columns):
            raise UserError(
                f"expected the columns {', '.join(sorted(missing))} in {where}, found "
                f"{', '.join(store.columns) or 'no samples'}; is it a dataset of latents?"
            )
        self._store, self.info = store, info
        self.vae, self.text_encoder = info.vae, info.text_encoder

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record, see above; raises UserError where it is damaged, naming it."""
        raw = self._store.raw(index)
        arrays = [self._array(raw, *want, index) for want in self._wants]
        record = {"latents": arrays[0].transpose(1, 2, 0).astype(np.float32, order="C")}
        caption = str(raw["caption"], "utf-8", "replace") if "caption" in raw else ""
        if self._tokenizer is not None:
            record["tokens"] = token_ids(self._tokenizer, [caption])[0]
        elif arrays[1].dtype == np.float16:
            record["caption_latents"] = arrays[1].copy()  # not a view of the file
        else:
            record["tokens"] = arrays[1].astype(np.int32)
        for (name, dtype, _), array in zip(self._wants, arrays, strict=True):
            # Without sign: exponent bits all set, and thus more than any finite number's
            if dtype == "<f2" and (array.view(np.uint16) & 0x7FFF).max() >= 0x7C00:
                raise UserError(
                    f"expected finite {name} in {self._store.where(index)}, found NaN or infinity; "
                    "precompute the dataset again"
                )
        key = str(raw["id"], "utf-8", "replace") if "id" in raw else str(index)
        return {**record, "caption": caption, "id": key, "index": np.int32(index)}

    def check_made_by(self, *, vae: str, text_encoder: str) -> None:
        """Raises UserError unless the data come from this VAE and this text encoder."""
        check_made_by((vae, text_encoder), (self.vae, self.text_encoder))

    def _array(
        self, raw: Mapping[str, Any], name: str, dtype: str, shape: tuple[int, ...], index: int
    ) -> np.ndarray:
        data, expected = raw[name], int(np.prod(shape)) * int(dtype[-1])
        found = memoryview(data).nbytes
        if found != expected:
            raise UserError(
                f"expected {expected} bytes of {name} {shape} in {self._store.where(index)}, found "
                f"{found}; set the resolution, channels and caption tokens the data were made with"
            )
        return np.frombuffer(data, dtype).reshape(shape)


def token_ids(
    tokenizer: Callable[[list[str]], Any], texts: Sequence[str]
) -> Int[np.ndarray, "n l"]:
    """The ids of texts, by a tokenizer that gives these alone, as CLIP's, or with a mask, as T5's.

    The mask is not kept: it is where ids are not 0.
    """
    found = tokenizer(list(texts))
    return found[0] if isinstance(found, tuple) else found


def check_made_by(expected: tuple[str, str], found: tuple[str, str]) -> None:
    """Raises UserError unless (vae, text_encoder) are the same."""
    for kind, want, have in zip(("VAE", "text encoder"), expected, found, strict=True):
        if want != have:
            raise UserError(
                f"expected data made with the {kind} {want}, found data made with {have}: "
                f"prepare the data with {want}, or give the one that made them as data.vae or "
                "data.text_encoder, by its repository or path"
            )


def infer_info(
    store: Store, *, vae: str | None, text_encoder: str | None, caption_tokens: int
) -> LatentInfo:
    """The facts of a dataset that has no sidecar, as the reference's: stated, or by byte count.

    Args:
      vae, text_encoder: what made the data; nothing in the files says so.
      caption_tokens: l of the caption embeddings.
    Raises:
      UserError: nobody said what made the data, or the first sample's bytes fit no shape.
    """
    if not vae or not text_encoder:
        raise UserError(
            f"expected {SIDECAR} beside {store.where(0)}, found none; state the VAE and the text "
            "encoder that made the data, such as vae=stabilityai/stable-diffusion-xl-base-1.0"
        )
    if caption_tokens < 1:
        raise UserError(f"the number of caption tokens must be at least 1, found {caption_tokens}")
    raw, latents = store.raw(0), {}
    for name in store.columns:
        if name.startswith("latents_") and name.removeprefix("latents_").isdecimal():
            side = int(name.removeprefix("latents_"))
            pixels = (side // _REDUCTION) ** 2
            latents[side] = (_times(raw, name, pixels, store), *(side // _REDUCTION,) * 2)
    captions = None
    if "caption_latents" in store.columns:
        captions = (caption_tokens, _times(raw, "caption_latents", caption_tokens, store))
    return LatentInfo(vae, text_encoder, latents, captions)


def _times(raw: Mapping[str, Any], name: str, divisor: int, store: Store) -> int:
    values, rest = divmod(memoryview(raw[name]).nbytes, 2 * divisor)
    if rest or not values:
        raise UserError(
            f"expected multiples of {2 * divisor} bytes of {name} in {store.where(0)}, found "
            f"{memoryview(raw[name]).nbytes}; state the number of caption tokens, or precompute"
        )
    return values
