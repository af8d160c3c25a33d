"""Sources of captioned pictures by the names that --source takes."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from microdit_jax.errors import UserError
from microdit_jax.prepare.sources import (
    cc12m,
    coco2014,
    diffusiondb,
    emoji,
    folder,
    journeydb,
    mds_images,
    sa1b,
    textcaps,
    webdataset,
)
from microdit_jax.prepare.sources.pictures import Fraction, Pictures


class Request(NamedTuple):
    """Where to read: --input, --split, --captions and --cache, None where not given."""

    input: str | None
    split: str | None
    captions: str | None
    cache: str | None


def _tfds(request: Request) -> Pictures:
    from microdit_jax.prepare.sources.tfds_images import TfdsPictures  # TFDS is slow to import

    return TfdsPictures(request.input, request.split or "train")


class _Kind(NamedTuple):
    """How a source is opened, and which options it takes beside --input."""

    open: Callable[[Request], Pictures]
    options: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()


def _published(module, *splits: str) -> _Kind:
    """One of the paper's datasets, its first split by default."""

    def open_pictures(request: Request) -> Pictures:
        root = Path(request.input)
        return (
            module.open_pictures(root, request.split or splits[0])
            if splits
            else (module.open_pictures(root))
        )

    return _Kind(open_pictures, ("split",) if splits else (), splits)


KINDS = {
    "folder": _Kind(
        lambda r: folder.open_folder(Path(r.input), r.captions and Path(r.captions)),
        ("captions",),
    ),
    "webdataset": _Kind(lambda r: webdataset.open_webdataset(Path(r.input))),
    "mds": _Kind(lambda r: mds_images.MdsPictures(r.input, cache=r.cache), ("cache",)),
    "tfds": _Kind(_tfds, ("split",)),
    "emoji": _Kind(
        lambda r: emoji.open_pictures(r.split or "train"), ("split",), ("train", "heldout")
    ),
    "cc12m": _published(cc12m),
    "sa1b": _published(sa1b),
    "journeydb": _published(journeydb, "train", "valid"),
    "diffusiondb": _published(diffusiondb),
    "textcaps": _published(textcaps, "train", "val"),
    "coco2014": _published(coco2014, "val", "train"),
}


def open_source(
    name: str,
    input: str | None = None,
    *,
    split: str | None = None,
    captions: str | None = None,
    cache: str | None = None,
    fraction: float = 1.0,
) -> Pictures:
    """The pictures of a source.

    Args:
      name: one of `KINDS`.
      input: its folder; the emoji set has none.
      split, captions, cache: for the sources that have them.
      fraction: share of the source's parts (shards, archives, or thousands of files), for a trial.
    Raises:
      UserError: no such source, one without pictures, or an option that it does not take.
    """
    if name not in KINDS:
        raise UserError(f"--source must be one of {', '.join(KINDS)}, found {name!r}")
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction must be above 0 and at most 1, found {fraction}")
    kind, request = KINDS[name], Request(input, split, captions, cache)
    needed = name != "emoji"
    if needed != (input is not None):
        raise UserError(f"--source={name} {'needs --input' if needed else 'has no --input'}")
    for option in ("split", "captions", "cache"):
        if getattr(request, option) is not None and option not in kind.options:
            raise UserError(f"--source={name} takes no --{option}; leave it out")
    if kind.splits and split is not None and split not in kind.splits:
        raise UserError(f"{name} has the splits {', '.join(kind.splits)}, found {split!r}")
    source = kind.open(request)
    if not source.parts:
        raise UserError(f"expected pictures in {input}, found an empty dataset")
    return source if fraction == 1 else Fraction(source, fraction)
