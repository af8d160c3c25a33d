"""Images in archives, each archive a part: keys, captions beside the images, nothing uncounted.

A key is a name up to the first dot of its last part, as the webdataset library has it; what follows
is a member's ending. Members of a key may lie anywhere in their archive.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from microdit_jax.errors import UserError, visible
from microdit_jax.prepare.sources.archives import Member, members
from microdit_jax.prepare.sources.caption_choice import FIRST, CaptionChoice
from microdit_jax.prepare.sources.listed_images import (
    SUFFIXES,
    UNREAD_SUFFIXES,
    SourceImage,
    WholeParts,
    skipped_image,
)

# Name of an image's member -> its caption, a list of them, or None
CaptionOf = Callable[[str], Any]
# A text's ending (".txt", ".edit.json") and its bytes -> the caption, a list of them, or None
CaptionIn = Callable[[str, bytes], Any]
# In which of an image's texts its caption is looked for first
TEXTS = (".txt", ".caption", ".json")
_MAX_CAPTIONS = 1 << 28  # characters of one archive's captions in memory


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name into its key and its ending, in small letters: "a/b", ".edit.txt"."""
    path = PurePosixPath(name)
    stem, dot, rest = path.name.partition(".")
    return (str(path.with_name(stem)), dot + rest.lower()) if stem else (str(path), "")


def _parted(ending: str) -> tuple[str, str]:
    """Splits an ending into what stands before its last dot and its suffix: ".edit", ".txt"."""
    inner, dot, last = ending.rpartition(".")
    return inner, dot + last


@dataclasses.dataclass
class _Key:
    """Members of an archive that have one key.

    Attributes:
      images: names of its images, each with its ending and why it cannot be read, in stored order.
      captions: in its texts, by their endings.
      unread: why a text of it cannot be read.
      endings: of its other members.
      taken: the names of the images that become records, each with the caption's endings to try.
    """

    images: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)
    captions: dict[str, Any] = dataclasses.field(default_factory=dict)
    unread: str | None = None
    endings: list[str] = dataclasses.field(default_factory=list)
    taken: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def choose(self, asked: str | None) -> None:
        """Decides which images become records: each that has a text of its own, else the first."""
        usable = [(name, ending) for name, ending, reason in self.images if reason is None]
        if asked is not None:
            usable = [(name, ending) for name, ending in usable if ending == asked]
        order = sorted(self.captions, key=lambda ending: TEXTS.index(_parted(ending)[1]))
        inners = set()
        for name, ending in usable:
            inner = _parted(ending)[0]
            own = [text for text in order if _parted(text)[0] == inner]
            if own and inner not in inners:
                inners.add(inner)
                self.taken[name] = own + order
        if usable and not self.taken:
            self.taken[usable[0][0]] = order


class ArchivedImages(WholeParts):
    """A source whose parts are archives, or unpacked folders; read from front to back."""

    def __init__(
        self,
        archives: Sequence[Path],
        captions_of: Callable[[Path], CaptionOf] | None = None,
        *,
        caption_in: CaptionIn | None = None,
        names: Sequence[str] | None = None,
        whole_keys: bool = False,
        image_ending: str | None = None,
        choice: CaptionChoice = FIRST,
        aside: Callable[[str], bool] = lambda name: False,
        attribution: str = "",
        skip_reason_of: Callable[[str], str | None] = lambda name: None,
    ):
        """
        Args:
          captions_of: called for each archive that is read; where captions lie elsewhere.
          caption_in: reads captions from the texts beside the images.
          names: the parts' names, by default the archives' own.
          whole_keys: ids are a key with its folders, not its last part alone.
          image_ending: of a key's images the one that is taken, such as ".input.jpg".
          aside: tells the members of an archive that belong to no image.
          skip_reason_of: why an image of that name is left out, or None.
        """
        self._archives = list(archives)
        self._captions_of, self._caption_in = captions_of, caption_in
        self._whole_keys, self._image_ending = whole_keys, image_ending
        self._choice, self._aside, self._skip_reason_of = choice, aside, skip_reason_of
        self.parts = [path.name for path in archives] if names is None else list(names)
        self.attribution = attribution

    def fingerprint(self, part: int) -> str:
        """Returns what changes when an archive grows or is another one; its bytes are not read."""
        path = self._archives[part]
        try:
            found = sorted(os.listdir(path)) if path.is_dir() else [str(path.stat().st_size)]
        except OSError as error:  # reading it is what tells
            found = [type(error).__name__]
        return hashlib.sha256("\n".join(found).encode(errors="surrogateescape")).hexdigest()

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one archive, and one entry for each key without an image."""
        archive, prefix = self._archives[part], _without_suffix(self.parts[part], self._whole_keys)
        keys = self._survey(archive)
        caption_of = None if self._captions_of is None else self._captions_of(archive)
        left = sum(len(key.images) or 1 for key in keys.values())
        told, seen = set[str](), set[str]()
        is_damaged = False
        for member in members(archive, wants=lambda name: _is_image(split_name(name)[1])):
            name, ending = split_name(member.name)
            key = keys.get(name)
            if not member.name:
                is_damaged = True  # where it was cut off, a last member may be listed, not read
                yield skipped_image(f"{prefix}/", member.reason or "damaged")
            elif key is None:
                continue  # told aside, or not there at first: `left` knows
            elif _is_image(ending):
                left -= 1
                yield self._image_of(member, ending, key, f"{prefix}/{self._id(name)}", seen,
                                     caption_of)  # fmt: skip
            elif not key.images and name not in told:
                left -= 1
                told.add(name)
                reason = f"no image ({', '.join(sorted(set(key.endings)))})"
                yield skipped_image(f"{prefix}/{self._id(name)}", key.unread or reason)
        if left and not is_damaged:
            yield skipped_image(f"{prefix}/", "the archive changed while it was read")

    def _image_of(
        self,
        image: Member,
        ending: str,
        key: _Key,
        id: str,
        seen: set[str],
        caption_of: CaptionOf | None,
    ) -> SourceImage:
        """Returns an image that is read, or why it is not; exactly one for each member."""
        inner, suffix = _parted(ending)
        reason = image.reason
        if suffix in UNREAD_SUFFIXES:
            reason = reason or f"a format that is not read ({suffix})"
        elif reason is None and image.name not in key.taken:
            reason = "another image of the same key"
        if inner and any(_parted(text)[0] == inner for text in key.captions):
            id += inner
        if reason is None and image.name in seen:
            reason = "duplicate id"
        reason = reason or self._skip_reason_of(image.name)
        if reason is not None:
            return skipped_image(id, reason)
        seen.add(image.name)
        found = [key.captions[text] for text in key.taken[image.name]]
        if caption_of is not None:
            found = [caption_of(image.name)]
        captions = (self._choice(value, id) for value in found)
        caption = next((caption for caption in captions if caption is not None), None)
        if caption is None:
            return skipped_image(id, key.unread or "no caption")
        data = image.data
        return SourceImage(id, caption, lambda: data, num_bytes=len(data))

    def _id(self, key: str) -> str:
        return key if self._whole_keys else PurePosixPath(key).name

    def _survey(self, archive: Path) -> dict[str, _Key]:
        """Lists an archive's keys with their captions; images are not read."""
        keys: dict[str, _Key] = {}
        held = 0

        def wants(name: str) -> bool:
            is_text = self._caption_in is not None and _parted(split_name(name)[1])[1] in TEXTS
            return is_text or self._aside(name)

        for member in members(archive, wants=wants):
            if not member.name or (self._aside(member.name) and member.reason is None):
                continue
            name, ending = split_name(member.name)
            key = keys.setdefault(name, _Key())
            if _is_image(ending):
                key.images.append((member.name, ending, member.reason or _unread(ending)))
                continue
            key.endings.append(ending or "no ending")
            if member.reason is not None:
                key.unread = key.unread or member.reason
            elif self._caption_in is not None and wants(member.name):
                value = self._caption_in(ending, member.data)
                held += len(member.data) if value is not None else 0
                if held > _MAX_CAPTIONS:
                    key.unread = f"more than {_MAX_CAPTIONS >> 20} MB of captions in one archive"
                elif value is not None:
                    key.captions.setdefault(ending, value)
        for key in keys.values():
            key.choose(self._image_ending)
        return keys


def _is_image(ending: str) -> bool:
    return _parted(ending)[1] in SUFFIXES | UNREAD_SUFFIXES


def _unread(ending: str) -> str | None:
    suffix = _parted(ending)[1]
    return f"a format that is not read ({suffix})" if suffix in UNREAD_SUFFIXES else None


def _without_suffix(name: str, whole: bool) -> str:
    """Returns the start of an archive's ids."""
    if not whole:
        return name.split(".")[0]
    for suffix in (".gz", ".bz2", ".tgz", ".tar"):
        name = name.removesuffix(suffix)
    return name


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
