"""Records of stored latents: one type for all file formats, tied to the towers that made them.

A record has
  latents          (h, w, c) float32, sampled from the VAE and multiplied by its scaling factor
  caption_latents  (l, width) float16, or tokens (l,) int32 where the run embeds captions itself
  caption, id      str
  index            int32
Caption embeddings are 79 % of the bytes. They stay float16 up to the devices: a host that converts
them to float32 reads half as many records and sends twice the bytes.
On disk a sample has the columns latents_256 and/or latents_512 (c, h, w), caption_latents
(l, width), both float16, and caption, as the reference has them; ours adds id and caption_tokens.
"""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json
from microdit_jax.towers import Tokenizer

SIDECAR = "latents.json"
_FORMAT, _VERSION = "microdit_jax latents", 1
_MAX_AXIS = 2**20
_LATENTS = re.compile("latents_([1-9][0-9]{1,5})")  # columns, by pixels of a side
# Image pixels per latent along a side, in all the reference's VAEs.
_REDUCTION = 8


class ArrayColumn(NamedTuple):
    """Type and shape of the arrays in one column, as stored."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes of one array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class LatentInfo:
    """Towers that made a dataset's latents, and their shapes; stored as latents.json beside them.

    Attributes:
      vae, text_encoder: names, as models carry them.
      latents: pixels of a side -> shape (c, h, w) as stored.
      captions: shape (l, width) of the embeddings, or None where there are none.
      tokens: l of the stored token ids, or None where there are none.
      scaling_factor: the VAE's, needed to decode; None where it is not known.
      attribution: the text that the licence of the images wants shown.
    """

    vae: str
    text_encoder: str
    latents: dict[int, tuple[int, int, int]]
    captions: tuple[int, int] | None
    tokens: int | None = None
    scaling_factor: float | None = None
    attribution: str = ""

    @property
    def arrays(self) -> dict[str, ArrayColumn]:
        """Columns that hold arrays, by name."""
        columns = {f"latents_{side}": ArrayColumn("<f2", s) for side, s in self.latents.items()}
        if self.captions is not None:
            columns["caption_latents"] = ArrayColumn("<f2", self.captions)
        if self.tokens is not None:
            columns["caption_tokens"] = ArrayColumn("<i4", (self.tokens,))
        return columns

    def to_json(self) -> str:
        """Returns the sidecar's text."""
        head = {"format": _FORMAT, "version": _VERSION}
        return json.dumps(head | dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "LatentInfo":
        """Reads the sidecar; raises UserError if it is not of this format and version."""
        try:
            values = parse_json(text)
            found = values.pop("format"), values.pop("version")
            if found != (_FORMAT, _VERSION):
                raise ValueError(f"found {found}")
            latents = {int(side): _shape(shape, 3) for side, shape in values["latents"].items()}
            captions = values["captions"] and _shape(values["captions"], 2)
            info = cls(**values | {"latents": latents, "captions": captions})
            info._check_types()
            return info
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"expected {_FORMAT}, version {_VERSION}, in {where}, could not use it "
                f"({visible(error)}); copy the file again, or remove it and state what made the "
                "data"
            ) from error

    def _check_types(self) -> None:
        """Raises ValueError for fields of other types or ranges than `to_json` writes."""
        factor, tokens = self.scaling_factor, self.tokens
        if not (
            all(isinstance(text, str) for text in (self.vae, self.text_encoder, self.attribution))
            and (tokens is None or (type(tokens) is int and 0 < tokens < _MAX_AXIS))
            and (factor is None or (type(factor) in (int, float) and 0 < factor < 1e30))
        ):
            raise ValueError("fields of other types")


def _shape(values: Sequence[int], axes: int) -> tuple[int, ...]:
    if len(values) != axes or not all(type(n) is int and 0 < n < _MAX_AXIS for n in values):
        raise ValueError(f"shape {visible(values, 60)}")
    return tuple(values)


@runtime_checkable
class Store(Protocol):
    """Random access to stored bytes, as `MdsReader` and `ArrayRecordStore` give it.

    Attributes:
      columns: name -> type, for messages.
      way: how records at a URL are read and why, in words; "" for local ones.
    """

    columns: dict[str, str]
    way: str

    def __len__(self) -> int: ...

    def raw(self, index: int) -> Mapping[str, Any]:
        """Returns the bytes of each column of a record."""
        ...

    def raws(self, indices: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """Returns what `raw` does for each of many records, in less time where it waits."""
        ...

    def where(self, index: int) -> str:
        """Names the record and its file, for messages."""
        ...


class _Part:
    """Some records of a store, numbered anew."""

    def __init__(self, store: Store, indices: Sequence[int]):
        self._store, self._indices = store, indices
        self.columns, self.way = store.columns, store.way

    def __len__(self) -> int:
        return len(self._indices)

    def raw(self, index: int) -> Mapping[str, Any]:
        return self._store.raw(self._indices[index])

    def raws(self, indices: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        return self._store.raws([self._indices[i] for i in indices])

    def where(self, index: int) -> str:
        return self._store.where(self._indices[index])


class StoredLatents:
    """Random access to the records of one dataset; a source for `pipeline.make_dataset`.

    Attributes:
      info: towers and shapes of the data; vae and text_encoder are also attributes of their own.
      way: the store's.
    """

    def __init__(
        self,
        store: Store,
        info: LatentInfo,
        *,
        resolution: int,
        captions: str = "embeddings",
        tokenizer: Tokenizer | None = None,
    ):
        """
        Args:
          resolution: pixels of a side of the images whose latents are read.
          captions: "embeddings" as stored, or "tokens" for a run that embeds captions itself.
          tokenizer: makes the ids of a caption where none are stored.
        Raises:
          UserError: the dataset has no such latents or captions.
        """
        where = store.where(0).split(" of ", 1)[-1] if len(store) else "an empty dataset"
        if resolution not in info.latents:
            raise UserError(
                f"expected latents of {resolution} px, found those of "
                f"{', '.join(map(str, info.latents))} px in {where}; choose one of them, or "
                "prepare others"
            )
        if captions not in ("embeddings", "tokens"):
            raise UserError(f"captions must be embeddings or tokens, found {captions!r}")
        self._latents, self._captions, self._tokenizer = f"latents_{resolution}", None, None
        if captions == "embeddings":
            if info.captions is None:
                raise UserError(
                    f"expected caption embeddings, found token ids alone in {where}; train with "
                    "captions=tokens, or prepare them by python -m microdit_jax.prepare "
                    "--captions_as=embeddings"
                )
            self._captions = "caption_latents"
        elif info.tokens is not None:
            self._captions = "caption_tokens"
        elif tokenizer is None:
            raise UserError(
                f"expected token ids of captions, found none in {where}, nor a tokenizer to make "
                "them; prepare them by python -m microdit_jax.prepare --captions_as=tokens, or "
                "train with captions=embeddings"
            )
        else:
            self._tokenizer = tokenizer
        wanted = [name for name in (self._latents, self._captions) if name is not None]
        if missing := set(wanted) - set(store.columns):
            raise UserError(
                f"expected the columns {', '.join(sorted(missing))} in {where}, found "
                f"{', '.join(store.columns) or 'no samples'}; is it a dataset of latents?"
            )
        self._store, self.info, self._columns = store, info, info.arrays
        self.vae, self.text_encoder = info.vae, info.text_encoder
        self.way = store.way

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a record, see above; raises UserError if it is damaged, naming it."""
        return self._record(index, self._store.raw(index))

    def records(self, indices: Int[np.ndarray, " n"]) -> list[dict[str, Any]]:
        """Returns many records, which a store elsewhere reads at once; raises as `[]` does."""
        numbers = indices.tolist()
        raws = self._store.raws(numbers)
        return [self._record(i, raw) for i, raw in zip(numbers, raws, strict=True)]

    def _record(self, index: int, raw: Mapping[str, Any]) -> dict[str, Any]:
        latents = self._array(raw, self._latents, index)  # c h w
        caption = str(raw["caption"], "utf-8", "replace") if "caption" in raw else ""
        if self._tokenizer is not None:
            embedded = {"tokens": self._tokenizer([caption])[0]}
        else:
            array = self._array(raw, self._captions or "", index)
            name = "tokens" if self._captions == "caption_tokens" else "caption_latents"
            embedded = {name: array.astype(array.dtype.newbyteorder("="))}  # no view of the file
        return {
            "latents": latents.transpose(1, 2, 0).astype(np.float32, order="C"),
            **embedded,
            "caption": caption,
            "id": str(raw["id"], "utf-8", "replace") if "id" in raw else str(index),
            "index": np.int32(index),
        }

    def part(self, indices: Sequence[int]) -> "StoredLatents":
        """Keeps these records, numbered anew."""
        chosen = copy.copy(self)
        chosen._store = _Part(self._store, indices)
        return chosen

    def check_made_by(self, *, vae: str, text_encoder: str) -> None:
        """Raises UserError unless the data come from this VAE and this text encoder."""
        check_made_by((vae, text_encoder), (self.vae, self.text_encoder))

    def _array(self, raw: Mapping[str, Any], name: str, index: int) -> np.ndarray:
        """Views the stored bytes of one array; raises UserError if they are not valid."""
        column, found = self._columns[name], memoryview(raw[name]).nbytes
        if found != column.nbytes:
            raise UserError(
                f"expected {column.nbytes} bytes of {name} {column.shape} in "
                f"{self._store.where(index)}, found {found}; set the resolution, channels and "
                "caption tokens the data were made with"
            )
        array = np.frombuffer(raw[name], column.dtype).reshape(column.shape)
        # Without the sign bit, NaN and infinity are the numbers whose exponent bits are all set
        if column.dtype == "<f2" and (array.view(np.uint16) & 0x7FFF).max() >= 0x7C00:
            raise UserError(
                f"expected finite {name} in {self._store.where(index)}, found NaN or infinity; "
                "prepare the dataset again"
            )
        return array


def check_made_by(expected: tuple[str, str], found: tuple[str, str]) -> None:
    """Raises UserError unless the pairs (vae, text_encoder) are the same."""
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
    """Describes a dataset without a sidecar, such as the reference's; shapes follow by byte count.

    Args:
      vae, text_encoder: towers that made the data; nothing in the files says so.
      caption_tokens: l of the caption embeddings.
    Raises:
      UserError: no towers given, or the first sample's bytes fit no shape.
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
        if match := _LATENTS.fullmatch(name):
            side = int(match[1])
            pixels = (side // _REDUCTION) ** 2
            latents[side] = (_times(raw, name, pixels, store), *(side // _REDUCTION,) * 2)
    captions = None
    if "caption_latents" in store.columns:
        captions = (caption_tokens, _times(raw, "caption_latents", caption_tokens, store))
    return LatentInfo(vae, text_encoder, latents, captions)


def _times(raw: Mapping[str, Any], name: str, divisor: int, store: Store) -> int:
    """Divides the number of float16 values in a column by `divisor`, without a remainder."""
    values, rest = divmod(memoryview(raw[name]).nbytes, 2 * divisor)
    if rest or not values:
        raise UserError(
            f"expected multiples of {2 * divisor} bytes of {name} in {store.where(0)}, found "
            f"{memoryview(raw[name]).nbytes}; state the number of caption tokens, or prepare"
        )
    return values
