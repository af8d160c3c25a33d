"""DiffusionDB Large: Stable Diffusion's images in zips, each zip with its prompts as json."""

import functools
import re
from pathlib import Path, PurePosixPath

from microdit_jax.files import parse_json
from microdit_jax.prepare.sources import tables
from microdit_jax.prepare.sources.archived_images import ArchivedImages, CaptionOf, find_archives
from microdit_jax.prepare.sources.archives import DAMAGE, read_member

# The reference skips images with a higher chance of being unsafe, by image or by prompt.
SAFETY_THRESHOLD = 0.2
_SCORES = ("image_name", "image_nsfw", "prompt_nsfw")
_MAX_PROMPTS = 64 << 20  # bytes; a part's 1,000 prompts take less than one MB


def open_images(root: Path) -> ArchivedImages:
    """Opens part-000001.zip (or folders) in `root` or one level below, and its table of scores."""
    patterns = ("part-[0-9]*.zip", "part-[0-9]*[0-9]")
    archives = find_archives(root, *patterns, *(f"*/{pattern}" for pattern in patterns))
    (table, *_) = find_archives(root, "metadata-large.parquet", "metadata.parquet")

    @functools.cache
    def unsafe() -> dict[str, str]:
        """Maps each image that is left out to the reason."""
        reasons = {}
        for row in tables.rows(table, columns=_SCORES):
            name, *scores = (tables.column(row, (column,), table) for column in _SCORES)
            # The reference keeps what is at most so unsafe, so nothing without a score
            if not all(isinstance(score, int | float) for score in scores):
                reasons[str(name)] = "without a score of its safety"
            elif not all(score <= SAFETY_THRESHOLD for score in scores):
                reasons[str(name)] = "unsafe by its scores"
        return reasons

    def captions_of(archive: Path) -> CaptionOf:
        prompts = _prompts(archive)
        return lambda name: prompts.get(PurePosixPath(name).name)

    def skip_reason_of(name: str) -> str | None:
        return unsafe().get(PurePosixPath(name).name)

    def is_prompts(name: str) -> bool:
        return re.fullmatch(r"part-\d+\.json", PurePosixPath(name).name) is not None

    return ArchivedImages(archives, captions_of, aside=is_prompts, skip_reason_of=skip_reason_of)


def _prompts(archive: Path) -> dict[str, str]:
    """Maps each image of a part to its prompt; empty where the json is missing or damaged."""
    name = f"{archive.name.split('.')[0]}.json"
    try:
        entries = parse_json(read_member(archive, name, _MAX_PROMPTS)).items()
    except (*DAMAGE, AttributeError):
        return {}
    prompts = {image: entry.get("p") for image, entry in entries if isinstance(entry, dict)}
    return {image: str(prompt) for image, prompt in prompts.items() if prompt is not None}
