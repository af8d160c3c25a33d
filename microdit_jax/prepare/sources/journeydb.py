"""JourneyDB: Midjourney's images in tgz archives, and a jsonl file with their prompts."""

import functools
from pathlib import Path, PurePosixPath

from microdit_jax.prepare.sources import tables
from microdit_jax.prepare.sources.archived_images import ArchivedImages, find_archives

# As published, the misspelling too.
_ANNOTATIONS = {
    "train": "train_anno_realease_repath.jsonl",
    "valid": "valid_anno_repath.jsonl",
}


def open_images(root: Path, split: str = "train") -> ArchivedImages:
    """Opens data/SPLIT below `root`: imgs/000.tgz (or unpacked folders) and the annotations.

    The caption is the prompt, as in the reference; archives that are not there are left out.
    """
    folder = root / "data" / split if (root / "data").is_dir() else root / split
    archives = find_archives(folder / "imgs", "[0-9]*.tgz", "[0-9]*[0-9]")
    (table, *_) = find_archives(folder, _ANNOTATIONS[split], f"{_ANNOTATIONS[split]}.tgz")
    there = {path.name.split(".")[0] for path in archives}

    @functools.cache
    def prompts() -> dict[str, str]:
        found = {}
        for row in tables.rows(table):
            path = PurePosixPath(str(tables.column(row, ("img_path",), table)))
            prompt = tables.text(row, ("prompt",), table)
            if path.parent.name in there and prompt is not None:
                found[path.name] = prompt
        return found

    def caption_of(name: str) -> str | None:
        return prompts().get(PurePosixPath(name).name)

    return ArchivedImages(archives, lambda archive: caption_of)
