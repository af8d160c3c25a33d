"""Conceptual 12M: a table of addresses and captions, fetched by img2dataset into tar shards."""

import json
from pathlib import Path

from microdit_jax.prepare.sources import tables
from microdit_jax.prepare.sources.webdataset import ArchivedImages, find_archives, text_or_json


def open_images(root: Path) -> ArchivedImages:
    """Opens the shards in `root`.

    A caption that a shard lacks is looked up by address in cc12m.tsv (address, caption; no header).
    """
    captions: dict[str, str] = {}
    table = root / "cc12m.tsv"

    def caption_of(name: str, files: dict[str, bytes]) -> str | None:
        caption = text_or_json(name, files)
        if caption is None and table.is_file():
            if not captions:
                rows = tables.rows(table, columns=("url", "caption"))
                captions.update((row["url"], row["caption"]) for row in rows)
            try:
                caption = captions.get(json.loads(files[".json"])["url"])
            except (KeyError, ValueError, TypeError):
                return None
        return caption

    return ArchivedImages(find_archives(root, "*.tar"), lambda archive: caption_of)
