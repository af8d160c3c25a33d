"""Images in archives, as img2dataset and most published datasets store them."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.archives import Member, members
from microdit_jax.prepare.sources.listed_images import SUFFIXES, SourceImage, skipped_image

# (the image's member name, files of the same key by suffix) -> the caption, or None
CaptionOf = Callable[[str, dict[str, bytes]], str | None]


class ArchivedImages:
    """A source whose parts are archives, or unpacked folders; read from front to back."""

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
        archive, seen = self._archives[part], set()
        caption_of = self._captions_of(archive)
        for key, files in _grouped(members(archive)):
            for suffix, member in files.items():
                if suffix not in SUFFIXES and member.reason is None:
                    continue
                id = f"{archive.name.split('.')[0]}/{PurePosixPath(key).name}"
                if member.reason is None and id in seen:
                    yield skipped_image(id, "duplicate id")
                else:
                    data = {suffix: file.data for suffix, file in files.items()}
                    yield self._image(id, member, data, caption_of)
                seen.add(id)
                break  # one image a key

    def _image(
        self, id: str, member: Member, files: dict[str, bytes], caption_of: CaptionOf
    ) -> SourceImage:
        reason = member.reason or self._skip_reason_of(member.name)
        if reason is not None:
            return skipped_image(id, reason)
        caption = caption_of(member.name, files)
        if caption is None:
            return skipped_image(id, "no caption")
        return SourceImage(id, caption, lambda: member.data)


def _grouped(found: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Groups consecutive members of one key, which is the path up to the name's first dot."""
    last, files = "", {}
    for member in found:
        path = PurePosixPath(member.name)
        stem, _, suffix = path.name.partition(".")
        key = str(path.with_name(stem)) if stem else member.name
        if (key != last or f".{suffix.lower()}" in files) and files:
            yield last, files
            files = {}
        last = key
        files[f".{suffix.lower()}"] = member
    if files:
        yield last, files


def text_or_json(name: str, files: dict[str, bytes]) -> str | None:
    """Finds img2dataset's caption of an image: in .txt, else in the .json's "caption"."""
    if ".txt" in files:
        return files[".txt"].decode("utf-8", "replace")
    try:
        caption = json.loads(files[".json"]).get("caption")
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
            f"expected {' or '.join(patterns)} in {root}, found none; check --input, or download "
            "the dataset as docs/datasets.md says"
        )
    return found


def open_webdataset(root: Path) -> ArchivedImages:
    """Opens the tar shards in a folder, with captions in .txt or .json files beside the images."""
    return ArchivedImages(find_archives(root, "*.tar"), lambda archive: text_or_json)
