"""DiffusionDB Large: Stable Diffusion's images in zips, each zip with its prompts as json."""

import json
import zipfile
from pathlib import Path, PurePosixPath

from microdit_jax.prepare.sources import tables
from microdit_jax.prepare.sources.webdataset import ArchivedImages, CaptionOf, find_archives

# The reference skips images with a higher chance of being unsafe, by image or by prompt.
SAFETY_THRESHOLD = 0.2
_SCORES = ("image_name", "image_nsfw", "prompt_nsfw")


def open_images(root: Path) -> ArchivedImages:
    """Opens part-000001.zip (or folders) in `root` or one level below, and its table of scores."""
    patterns = ("part-[0-9]*.zip", "part-[0-9]*[0-9]")
    archives = find_archives(root, *patterns, *(f"*/{pattern}" for pattern in patterns))
    (table, *_) = find_archives(root, "metadata-large.parquet", "metadata.parquet")
    unsafe: set[str] = set()

    def captions_of(archive: Path) -> CaptionOf:
        if not unsafe:
            unsafe.add("")  # read the table once, also where no image is unsafe
            for row in tables.rows(table, columns=_SCORES):
                if max(row["image_nsfw"], row["prompt_nsfw"]) > SAFETY_THRESHOLD:
                    unsafe.add(row["image_name"])
        prompts = _prompts(archive)
        return lambda name, files: prompts.get(PurePosixPath(name).name)

    def skip_reason_of(name: str) -> str | None:
        return "unsafe by its scores" if PurePosixPath(name).name in unsafe else None

    return ArchivedImages(archives, captions_of, skip_reason_of=skip_reason_of)


def _prompts(archive: Path) -> dict[str, str]:
    """Maps each image of a part to its prompt; empty where the json is missing or damaged."""
    name = f"{archive.name.split('.')[0]}.json"
    try:
        if archive.is_dir():
            data = (archive / name).read_bytes()
        else:
            with zipfile.ZipFile(archive) as file:
                path = next(n for n in file.namelist() if PurePosixPath(n).name == name)
                data = file.read(path)
        return {image: str(entry["p"]) for image, entry in json.loads(data).items()}
    except (OSError, ValueError, KeyError, TypeError, StopIteration, zipfile.BadZipFile):
        return {}
