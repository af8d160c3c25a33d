"""Datasets of captioned images by the names that --source takes."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from microdit_jax.data import twemoji
from microdit_jax.errors import UserError
from microdit_jax.prepare.sources import (
    cc12m,
    coco,
    diffusiondb,
    emoji,
    folder,
    journeydb,
    mds_images,
    openmoji,
    parquet_images,
    sa1b,
    textcaps,
    webdataset,
)
from microdit_jax.prepare.sources.caption_choice import CaptionChoice
from microdit_jax.prepare.sources.listed_images import Fraction, ImageSource


class SourceOptions(NamedTuple):
    """Values of the flags of those names; None: not given.

    Attributes:
      input: "" for the emoji sets.
      seed: decides which caption of a list is taken at random.
    """

    input: str
    split: str | None = None
    captions: str | None = None
    cache: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    captions_of_a_list: str | None = None
    seed: int = 0

    @property
    def choice(self) -> CaptionChoice:
        """Rule that takes one caption of a list."""
        return CaptionChoice(self.captions_of_a_list or "first", self.seed)


_COLUMNS = ("image_column", "caption_column", "captions_of_a_list")


class _Kind(NamedTuple):
    """Opens one kind of source, and names the options it takes beside --input.

    Attributes:
      photographs: files as cameras leave them, to be turned by their orientation.
    """

    open: Callable[[SourceOptions], ImageSource]
    options: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    photographs: bool = False


def _published(open_images: Callable[..., ImageSource], *splits: str) -> _Kind:
    """Returns the kind of one of the paper's datasets; its first split is the default."""
    if not splits:
        return _Kind(lambda o: open_images(Path(o.input)))
    return _Kind(lambda o: open_images(Path(o.input), o.split or splits[0]), ("split",), splits)


def _folder(options: SourceOptions) -> ImageSource:
    table = None if options.captions is None else Path(options.captions)
    return folder.open_folder(Path(options.input), table, options.choice)


def _webdataset(options: SourceOptions) -> ImageSource:
    return webdataset.open_webdataset(
        options.input,
        image_column=options.image_column,
        caption_column=options.caption_column,
        choice=options.choice,
    )


def _parquet(options: SourceOptions) -> ImageSource:
    return parquet_images.ParquetImages(
        options.input,
        split=options.split,
        image_column=options.image_column,
        caption_column=options.caption_column,
        choice=options.choice,
    )


def _tfds(options: SourceOptions) -> ImageSource:
    from microdit_jax.prepare.sources.tfds_images import TfdsImages  # TFDS is slow to import

    return TfdsImages(options.input, options.split or "train", options.choice)


KINDS = {
    "folder": _Kind(_folder, ("captions", "captions_of_a_list"), photographs=True),
    "webdataset": _Kind(_webdataset, _COLUMNS),
    "parquet": _Kind(_parquet, ("split", *_COLUMNS), photographs=True),
    "mds": _Kind(
        lambda o: mds_images.MdsImages(o.input, cache=o.cache, choice=o.choice),
        ("cache", "captions_of_a_list"),
    ),
    "tfds": _Kind(_tfds, ("split", "captions_of_a_list")),
    "emoji": _Kind(lambda o: emoji.open_images(o.split or "train"), ("split",), twemoji.SPLITS),
    "openmoji": _Kind(
        lambda o: openmoji.open_images(o.split or "train"), ("split",), twemoji.SPLITS
    ),
    "cc12m": _published(cc12m.open_images),
    "sa1b": _published(sa1b.open_images),
    "journeydb": _published(journeydb.open_images, "train", "valid"),
    "diffusiondb": _published(diffusiondb.open_images),
    "textcaps": _published(textcaps.open_images, "train", "val"),
    "coco2014": _published(coco.open_2014, "val", "train"),
    "coco2017": _published(coco.open_2017, "val", "train"),
}


def open_source(
    name: str,
    input: str | None = None,
    *,
    fraction: float = 1.0,
    seed: int = 0,
    **options: str | None,
) -> ImageSource:
    """Opens a source of captioned images.

    Args:
      name: one of `KINDS`.
      input: its folder; the emoji sets have none.
      fraction: share of the source's parts (shards, archives, or thousands of files), for a trial.
      options: for the sources that have them, by the names in `SourceOptions`.
    Raises:
      UserError: no such source, one without images, or an option that it does not take.
    """
    if name not in KINDS:
        raise UserError(f"--source must be one of {', '.join(KINDS)}, found {name!r}")
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction must be above 0 and at most 1, found {fraction}")
    kind = KINDS[name]
    needed = name not in ("emoji", "openmoji")
    if needed != (input is not None):
        raise UserError(f"--source={name} {'needs --input' if needed else 'has no --input'}")
    for option, value in options.items():
        if value is not None and option not in kind.options:
            raise UserError(f"--source={name} takes no --{option}; leave it out")
    split = options.get("split")
    if kind.splits and split is not None and split not in kind.splits:
        raise UserError(f"{name} has the splits {', '.join(kind.splits)}, found {split!r}")
    source = kind.open(SourceOptions(input or "", seed=seed, **options))
    if not source.parts:
        raise UserError(f"expected images in {input}, found an empty dataset")
    return source if fraction == 1 else Fraction(source, fraction)
