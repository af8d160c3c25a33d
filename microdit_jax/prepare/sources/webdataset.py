"""Images in archives, as img2dataset and most published datasets store them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json
from microdit_jax.prepare.sources.archives import Member, members, suffix_of
from microdit_jax.prepare.sources.listed_images import SUFFIXES, SourceImage, skipped_image

# (the image's member name, files of the same key by suffix) -> the caption, or None
CaptionOf = Callable[[str, dict[str, bytes]], str | None]


class ArchivedImages:
    """A source whose parts are archives, or unpacked folders; read from front to back."""

    notes = ()

    def __init__(
        self,
        archives: Sequence[Path],
        captions_of: Callable[[Path], CaptionOf],
        *,
        attribution: str = "",
        skip_reason_of: Callable[[str], str | None] = lambda name: None,
    ):
        """
        Args:
          captions_of: called for each archive that is read.
          skip_reason_of: why an image of that name is left out, or None.
        """
        self._archives = list(archives)
        self._captions_of, self._skip_reason_of = captions_of, skip_reason_of
        self.parts = [path.name for path in archives]
        self.attribution = attribution

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one archive."""
        archive, seen = self._archives[part], set[str]()
        caption_of = self._captions_of(archive)
        for key, group in _grouped(members(archive)):
            id = f"{archive.name.split('.')[0]}/{PurePosixPath(key).name}"
            images = [member for suffix, member in group.items() if suffix in SUFFIXES]
            texts = {s: member for s, member in group.items() if s not in SUFFIXES}
            unread = [member.reason for member in texts.values() if member.reason is not None]
            if not images and unread:
                yield skipped_image(id, unread[0])
            for image in images:
                reason = image.reason or ("duplicate id" if id in seen else None)
                reason = reason or self._skip_reason_of(image.name)
                seen.add(id)
                if reason is None:
                    read = {suffix: text.data for suffix, text in texts.items() if not text.reason}
                    caption = caption_of(image.name, read)
                    reason = None if caption is not None else (*unread, "no caption")[0]
                if reason is not None:
                    yield skipped_image(id, reason)
                else:
                    load = functools.partial(getattr, image, "data")
                    yield SourceImage(id, caption, load, num_bytes=len(image.data))


def _grouped(found: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Groups consecutive members of one key, which is the path up to the name's first dot.

    Of several images of one key, the first alone keeps its data.
    """
    last, files, has_image = "", {}, False
    for member in found:
        path, suffix = PurePosixPath(member.name), suffix_of(member.name)
        stem = path.name.partition(".")[0]
        key = str(path.with_name(stem)) if stem else member.name
        if (key != last or suffix in files) and files:
            yield last, files
            files, has_image = {}, False
        last = key
        if suffix in SUFFIXES and member.reason is None:
            member = member._replace(data=b"", reason="duplicate id") if has_image else member
            has_image = True
        if member.data or member.reason is not None or suffix in SUFFIXES:
            files[suffix] = member
    if files:
        yield last, files


def text_or_json(name: str, files: dict[str, bytes]) -> str | None:
    """Finds img2dataset's caption of an image: in .txt, else in the .json's "caption"."""
    if ".txt" in files:
        return files[".txt"].decode("utf-8", "replace")
    try:
        caption = parse_json(files[".json"]).get("caption")
    except (KeyError, ValueError, AttributeError):
        return None
    return None if caption is None else str(caption)


def find_archives(root: Path, *patterns: str) -> list[Path]:
    """Finds the archives (or folders) below `root` that match, sorted.

    Raises:
      UserError: there are none.
    """
    found = sorted({path for pattern in patterns for path in root.glob(pattern)})
    if not found:
        raise UserError(
            f"expected {' or '.join(patterns)} in {visible(root)}, found none; check --input, or "
            "download the dataset as docs/datasets.md says"
        )
    return found


def open_webdataset(root: Path) -> ArchivedImages:
    """Opens the tar shards in a folder, with captions in .txt or .json files beside the images."""
    return ArchivedImages(find_archives(root, "*.tar"), lambda archive: text_or_json)
