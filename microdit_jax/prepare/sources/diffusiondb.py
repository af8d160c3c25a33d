"""DiffusionDB Large: Stable Diffusion's pictures in zips, each with its own prompts as json."""

import json
import zipfile
from pathlib import Path, PurePosixPath

from microdit_jax.prepare.sources import tables
from microdit_jax.prepare.sources.webdataset import ArchivedPictures, CaptionOf, find_archives

# The reference leaves out pictures whose own or whose prompt's chance of being unsafe is higher.
SAFETY_THRESHOLD = 0.2
_SCORES = ("image_name", "image_nsfw", "prompt_nsfw")


def open_pictures(root: Path) -> ArchivedPictures:
    """part-000001.zip (or folders), in `root` or one level below, and metadata-large.parquet."""
    patterns = ("part-[0-9]*.zip", "part-[0-9]*[0-9]")
    archives = find_archives(root, *patterns, *(f"*/{pattern}" for pattern in patterns))
    (table, *_) = find_archives(root, "metadata-large.parquet", "metadata.parquet")
    unsafe: set[str] = set()

    def captions_of(archive: Path) -> CaptionOf:
        if not unsafe:
            unsafe.add("")  # read once, also where no picture is unsafe
            for row in tables.rows(table, columns=_SCORES):
                if max(row["image_nsfw"], row["prompt_nsfw"]) > SAFETY_THRESHOLD:
                    unsafe.add(row["image_name"])
        prompts = _prompts(archive)
        return lambda name, files: prompts.get(PurePosixPath(name).name)

    def reason_of(name: str) -> str | None:
        return "unsafe by its scores" if PurePosixPath(name).name in unsafe else None

    return ArchivedPictures(archives, captions_of, reason_of=reason_of)


def _prompts(archive: Path) -> dict[str, str]:
    """Picture -> prompt of one part; empty where its json is missing or damaged."""
    name = f"{archive.name.split('.')[0]}.json"
    try:
        if archive.is_dir():
            data = (archive / name).read_bytes()
        else:
            with zipfile.ZipFile(archive) as file:
                path = next(n for n in file.namelist() if PurePosixPath(n).name == name)
                data = file.read(path)
        return {picture: str(entry["p"]) for picture, entry in json.loads(data).items()}
    except (OSError, ValueError, KeyError, TypeError, StopIteration, zipfile.BadZipFile):
        return {}
